#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

namespace pepr {

// CPU time that the lanes of a recording may take together, as a share of one core.
struct Budget {
    explicit Budget(double share) : limit_ppb(static_cast<std::int64_t>(share * 1e9)) {}
    const std::int64_t limit_ppb;
    // What the lanes would take unstretched; a sum in which each lane keeps its part: relaxed.
    std::atomic<std::int64_t> wanted_ppb{0};
};

// One lane's part in a budget. Where the lanes would take more than they may, all are stretched by
// the same factor: the budget is split by need. Windows of at least 1 s; the first second, in which
// drivers warm up and cadences are learnt, is not counted.
class Throttle {
public:
    explicit Throttle(std::shared_ptr<Budget> budget) : budget_(std::move(budget)) {}
    ~Throttle() { want(0); }
    Throttle(const Throttle&) = delete;
    Throttle& operator=(const Throttle&) = delete;

    // Counts a read that ended at t_ns. True once a window is full: `account` wants to be called.
    bool read(std::int64_t t_ns) noexcept;
    // The lane's thread had used cpu_ns of CPU time at t_ns.
    void account(std::int64_t t_ns, std::int64_t cpu_ns) noexcept;
    // What must lie between the beginnings of two reads; 0: whatever is wanted.
    std::int64_t gap_ns() const noexcept { return gap_ns_; }

private:
    void want(std::int64_t ppb) noexcept;

    std::shared_ptr<Budget> budget_;
    std::int64_t begin_ns_ = -1, begin_cpu_ns_ = -1, reads_ = 0;
    std::int64_t wanted_ns_ = 1, wanted_ppb_ = 0, gap_ns_ = 0;
};

}  // namespace pepr
