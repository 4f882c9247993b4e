#include "sampling/budget.h"

#include <algorithm>

#include "sampling/cadence.h"
#include "system/clock.h"

namespace pepr {

namespace {

constexpr std::int64_t kWindowNs = kNsPerS;
constexpr double kGiveWay = 4.0;
constexpr double kPart = 0.5;  // of the budget, for those that give way

}  // namespace

void CpuBudget::want(bool gives_way, std::int64_t by_ppb) noexcept {
    (gives_way ? give_way_ppb_ : follow_ppb_).fetch_add(by_ppb, std::memory_order_relaxed);
}

double CpuBudget::stretch(bool gives_way) const noexcept {
    const auto follow = static_cast<double>(follow_ppb_.load(std::memory_order_relaxed));
    const auto give_way = static_cast<double>(give_way_ppb_.load(std::memory_order_relaxed));
    const double least = give_way / kGiveWay;
    if (follow + least <= limit_ppb_) {
        const double most = std::min(limit_ppb_ - follow, std::max(limit_ppb_ * kPart, least));
        return gives_way ? std::max(1.0, give_way / most) : 1.0;
    }
    const double all = (follow + give_way) / limit_ppb_;
    if (gives_way || all >= kGiveWay) return std::max(all, kGiveWay);
    return follow / (limit_ppb_ - least);
}

bool Throttle::read(std::int64_t t_ns, bool throttled) noexcept {
    if (begin_ns_ < 0) begin_ns_ = t_ns;
    ++reads_;
    if (throttled) ++throttled_reads_;
    return t_ns - begin_ns_ >= kWindowNs && reads_ > 1;
}

void Throttle::account(std::int64_t t_ns, std::int64_t cpu_ns, bool gives_way) noexcept {
    if (begin_cpu_ns_ >= 0 && budget_ != nullptr && reads_ > 0) {  // the last sample accounts twice
        // What it would like: the spacing while it is not throttled, remembered while it is.
        if (2 * throttled_reads_ < reads_)
            wanted_ns_ = std::max<std::int64_t>((t_ns - begin_ns_) / reads_, 1);
        const std::int64_t read_cpu_ns = (cpu_ns - begin_cpu_ns_) / reads_;
        want(gives_way, read_cpu_ns * kNsPerS / wanted_ns_);
        const double stretch = budget_->stretch(gives_way);
        const double min_spacing_ns =
            stretch > 1.0 ? stretch * static_cast<double>(wanted_ns_) : 0.0;
        min_spacing_ns_ =
            static_cast<std::int64_t>(std::min(min_spacing_ns, static_cast<double>(kMaxSpacingNs)));
    }
    begin_ns_ = t_ns;
    begin_cpu_ns_ = cpu_ns;
    reads_ = throttled_reads_ = 0;
}

void Throttle::want(bool gives_way, std::int64_t ppb) noexcept {
    if (budget_ == nullptr) return;
    budget_->want(gives_way_, -wanted_ppb_);
    budget_->want(gives_way, ppb);
    gives_way_ = gives_way;
    wanted_ppb_ = ppb;
}

}  // namespace pepr
