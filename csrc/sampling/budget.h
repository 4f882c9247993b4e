// Limits the CPU time that all lanes of a recording take together, by reading them less often.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

namespace pepr {

// The CPU time that the lanes may take together, as a share of one core.
//
// A lane that follows refreshes is read just after each refresh of its sensor. Read less often, it
// would no longer know when they come. A flexible lane follows none; read less often, it only loses
// resolution. So if all want more than the budget, first the flexible lanes are slowed down, to a
// fourth of their rate at most; then those that follow refreshes, to a fourth as well; then all by
// the same factor. Besides, flexible lanes get half of the budget at most, down to a fourth of
// their rate, even if nobody else needs the rest.
class CpuBudget {
public:
    explicit CpuBudget(double share) : limit_ppb_(share * 1e9) {}
    // Changes the sum that the flexible lanes, or the others, would take at the rate that they
    // want.
    void add_demand(bool is_flexible, std::int64_t by_ppb) noexcept;
    // By which factor such a lane is to be slowed down.
    double slowdown(bool is_flexible) const noexcept;

private:
    const double limit_ppb_;
    // Sums; each lane adds and subtracts its own part. Nothing else depends on them: relaxed.
    std::atomic<std::int64_t> following_ppb_{0}, flexible_ppb_{0};
};

// One lane's part in a budget. It measures in windows of at least 1 s. The first window, in which
// drivers warm up and refreshes are learnt, does not count.
class Throttle {
public:
    explicit Throttle(std::shared_ptr<CpuBudget> budget) : budget_(std::move(budget)) {}
    ~Throttle() { set_demand(is_flexible_, 0); }
    Throttle(const Throttle&) = delete;
    Throttle& operator=(const Throttle&) = delete;

    // Counts a read that ended at t_ns. `throttled`: the budget delayed it. True at the end of a
    // window: `end_window` is to be called.
    bool count_read(std::int64_t t_ns, bool throttled) noexcept;
    // At t_ns the lane's reads had taken cpu_ns of CPU time.
    void end_window(std::int64_t t_ns, std::int64_t cpu_ns, bool is_flexible) noexcept;
    // The least time between the beginnings of two reads; 0: the budget asks for none.
    std::int64_t min_spacing_ns() const noexcept { return min_spacing_ns_; }

private:
    void set_demand(bool is_flexible, std::int64_t ppb) noexcept;

    std::shared_ptr<CpuBudget> budget_;
    std::int64_t begin_ns_ = -1, begin_cpu_ns_ = -1;  // of the window
    std::int64_t reads_ = 0, throttled_reads_ = 0;
    std::int64_t wanted_spacing_ns_ = 1, demand_ppb_ = 0, min_spacing_ns_ = 0;
    bool is_flexible_ = false;
};

}  // namespace pepr
