#include "sampling/budget.h"

#include <algorithm>

#include "sampling/cadence.h"
#include "system/clock.h"

namespace pepr {

namespace {

constexpr std::int64_t kWindowNs = kNsPerS;
constexpr double kMostSlowdown = 4.0;   // before others are slowed down too
constexpr double kFlexibleShare = 0.5;  // of the budget

}  // namespace

void CpuBudget::add_demand(bool is_flexible, std::int64_t by_ppb) noexcept {
    (is_flexible ? flexible_ppb_ : following_ppb_).fetch_add(by_ppb, std::memory_order_relaxed);
}

double CpuBudget::slowdown(bool is_flexible) const noexcept {
    const auto following = static_cast<double>(following_ppb_.load(std::memory_order_relaxed));
    const auto flexible = static_cast<double>(flexible_ppb_.load(std::memory_order_relaxed));
    const double least_flexible = flexible / kMostSlowdown;
    if (following + least_flexible <= limit_ppb_) {
        const double most =
            std::min(limit_ppb_ - following, std::max(limit_ppb_ * kFlexibleShare, least_flexible));
        return is_flexible ? std::max(1.0, flexible / most) : 1.0;
    }
    const double all = (following + flexible) / limit_ppb_;
    if (is_flexible || all >= kMostSlowdown) return std::max(all, kMostSlowdown);
    return following / (limit_ppb_ - least_flexible);
}

bool Throttle::count_read(std::int64_t t_ns, bool throttled) noexcept {
    if (begin_ns_ < 0) begin_ns_ = t_ns;
    ++reads_;
    if (throttled) ++throttled_reads_;
    return t_ns - begin_ns_ >= kWindowNs && reads_ > 1;
}

void Throttle::end_window(std::int64_t t_ns, std::int64_t cpu_ns, bool is_flexible) noexcept {
    // The last sample may end a window a second time, without reads.
    if (begin_cpu_ns_ >= 0 && budget_ != nullptr && reads_ > 0) {
        // The spacing that the lane wants can only be seen while it is not throttled.
        if (2 * throttled_reads_ < reads_)
            wanted_spacing_ns_ = std::max<std::int64_t>((t_ns - begin_ns_) / reads_, 1);
        const std::int64_t read_cpu_ns = (cpu_ns - begin_cpu_ns_) / reads_;
        set_demand(is_flexible, read_cpu_ns * kNsPerS / wanted_spacing_ns_);
        const double slowdown = budget_->slowdown(is_flexible);
        const double spacing_ns =
            slowdown > 1.0 ? slowdown * static_cast<double>(wanted_spacing_ns_) : 0.0;
        min_spacing_ns_ =
            static_cast<std::int64_t>(std::min(spacing_ns, static_cast<double>(kMaxSpacingNs)));
    }
    begin_ns_ = t_ns;
    begin_cpu_ns_ = cpu_ns;
    reads_ = throttled_reads_ = 0;
}

void Throttle::set_demand(bool is_flexible, std::int64_t ppb) noexcept {
    if (budget_ == nullptr) return;
    budget_->add_demand(is_flexible_, -demand_ppb_);
    budget_->add_demand(is_flexible, ppb);
    is_flexible_ = is_flexible;
    demand_ppb_ = ppb;
}

}  // namespace pepr
