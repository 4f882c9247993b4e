#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

namespace pepr {

// CPU time that the lanes of a recording may take together, as a share of one core.
//
// Where they would take more, those that wait for no refresh give way first, up to a fourth of
// their rate: read less often they lose resolution, where a lane that follows refreshes loses the
// knowledge of when they come. Then those, to a fourth too, then all alike. Resolution is worth
// half of the budget: beyond that those that wait for none give way, to a fourth at most, whoever
// else there is.
class CpuBudget {
public:
    explicit CpuBudget(double share) : limit_ppb_(share * 1e9) {}
    // Changes what the lanes that follow refreshes, or those that give way, would like to take.
    void want(bool gives_way, std::int64_t by_ppb) noexcept;
    // How many times further apart such a lane is to be read.
    double stretch(bool gives_way) const noexcept;

private:
    const double limit_ppb_;
    // Sums in which each lane keeps its part: relaxed.
    std::atomic<std::int64_t> follow_ppb_{0}, give_way_ppb_{0};
};

// One lane's part in a budget. Windows of at least 1 s; the first second, in which drivers warm up
// and cadences are learnt, is not counted.
class Throttle {
public:
    explicit Throttle(std::shared_ptr<CpuBudget> budget) : budget_(std::move(budget)) {}
    ~Throttle() { want(gives_way_, 0); }
    Throttle(const Throttle&) = delete;
    Throttle& operator=(const Throttle&) = delete;

    // Counts a read that ended at t_ns, and was put off by `min_spacing_ns` if `throttled`. True
    // once a window is full: `account` wants to be called.
    bool read(std::int64_t t_ns, bool throttled) noexcept;
    // The lane's thread had used cpu_ns of CPU time at t_ns. `gives_way`: it waits for no refresh.
    void account(std::int64_t t_ns, std::int64_t cpu_ns, bool gives_way) noexcept;
    // What must lie between the beginnings of two reads; 0: whatever is wanted.
    std::int64_t min_spacing_ns() const noexcept { return min_spacing_ns_; }

private:
    void want(bool gives_way, std::int64_t ppb) noexcept;

    std::shared_ptr<CpuBudget> budget_;
    std::int64_t begin_ns_ = -1, begin_cpu_ns_ = -1, reads_ = 0, throttled_reads_ = 0;
    std::int64_t wanted_ns_ = 1, wanted_ppb_ = 0, min_spacing_ns_ = 0;
    bool gives_way_ = false;
};

}  // namespace pepr
