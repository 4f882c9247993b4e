#include "budget.h"

#include <algorithm>

#include "cadence.h"
#include "clock.h"

namespace pepr {

namespace {

constexpr std::int64_t kWindowNs = kNsPerS;

}  // namespace

bool Throttle::read(std::int64_t t_ns) noexcept {
    if (begin_ns_ < 0) begin_ns_ = t_ns;
    ++reads_;
    return t_ns - begin_ns_ >= kWindowNs && reads_ > 1;
}

void Throttle::account(std::int64_t t_ns, std::int64_t cpu_ns) noexcept {
    if (begin_cpu_ns_ >= 0 && budget_ != nullptr && reads_ > 0) {  // the last sample accounts twice
        const std::int64_t spacing_ns = (t_ns - begin_ns_) / reads_;
        // What it would like: the spacing while it is not held back, remembered while it is.
        if (spacing_ns > gap_ns_ + gap_ns_ / 8) wanted_ns_ = std::max<std::int64_t>(spacing_ns, 1);
        const std::int64_t read_cpu_ns = (cpu_ns - begin_cpu_ns_) / reads_;
        want(read_cpu_ns * kNsPerS / wanted_ns_);
        const auto stretch =
            static_cast<double>(budget_->wanted_ppb.load(std::memory_order_relaxed)) /
            static_cast<double>(budget_->limit_ppb);
        const double gap_ns = stretch > 1.0 ? stretch * static_cast<double>(wanted_ns_) : 0.0;
        gap_ns_ = static_cast<std::int64_t>(std::min(gap_ns, static_cast<double>(kLongestGapNs)));
    }
    begin_ns_ = t_ns;
    begin_cpu_ns_ = cpu_ns;
    reads_ = 0;
}

void Throttle::want(std::int64_t ppb) noexcept {
    if (budget_ == nullptr) return;
    budget_->wanted_ppb.fetch_add(ppb - wanted_ppb_, std::memory_order_relaxed);
    wanted_ppb_ = ppb;
}

}  // namespace pepr
