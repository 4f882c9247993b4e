// How lanes share a budget of CPU time, in virtual time.

#include <memory>
#include <vector>

#include "core_test.h"
#include "sampling/budget.h"

namespace {

// Lanes in virtual time, each read costing its CPU time: what they use together, from 10 s on.
struct VirtualLane {
    double period_ms, cost_us;
    bool is_flexible = false;
};

double used_share(double limit, const std::vector<VirtualLane>& lanes,
                  std::vector<double>* rates = nullptr) {
    const auto budget = std::make_shared<pepr::CpuBudget>(limit);
    struct Lane {
        std::unique_ptr<pepr::Throttle> throttle;
        std::int64_t period_ns, cost_ns;
        bool is_flexible;
        std::int64_t next_ns = 0, cpu_ns = 0, counted_ns = 0, reads = 0;
    };
    std::vector<Lane> all;
    for (const auto& [period_ms, cost_us, is_flexible] : lanes)
        all.push_back({std::make_unique<pepr::Throttle>(budget),
                       static_cast<std::int64_t>(1e6 * period_ms),
                       static_cast<std::int64_t>(1e3 * cost_us), is_flexible});
    constexpr std::int64_t kEndNs = 60 * kNsPerS, kFromNs = 10 * kNsPerS;
    for (;;) {
        Lane& lane = *std::min_element(all.begin(), all.end(), [](const Lane& a, const Lane& b) {
            return a.next_ns < b.next_ns;
        });
        if (lane.next_ns >= kEndNs) break;
        const std::int64_t t_ns = lane.next_ns;
        lane.cpu_ns += lane.cost_ns;
        if (t_ns >= kFromNs) {
            lane.counted_ns += lane.cost_ns;
            ++lane.reads;
        }
        const bool throttled = lane.throttle->min_spacing_ns() > lane.period_ns;
        if (lane.throttle->count_read(t_ns, throttled))
            lane.throttle->end_window(t_ns, lane.cpu_ns, lane.is_flexible);
        lane.next_ns = t_ns + std::max(lane.period_ns, lane.throttle->min_spacing_ns());
    }
    double sum_ns = 0;
    for (const Lane& lane : all) {
        sum_ns += static_cast<double>(lane.counted_ns);
        if (rates != nullptr) rates->push_back(static_cast<double>(lane.reads) / 50.0);
    }
    return sum_ns / static_cast<double>(kEndNs - kFromNs);
}

TEST(budget_slows_down_all_lanes_alike) {
    // given lanes that would take 2 %, 1 % and 0.1 % of a core, of whatever kind
    for (const bool is_flexible : {false, true}) {
        std::vector<double> rates;
        const double used =
            used_share(0.005, {{20, 400, is_flexible}, {10, 100}, {100, 100}}, &rates);
        CHECK(used <= 0.0051 && used > 0.004);
        CHECK(std::abs(rates[1] / rates[0] - 2) < 0.3 && std::abs(rates[1] / rates[2] - 10) < 1.5);
    }
}

TEST(budget_slows_down_flexible_lanes_first) {
    // given 0.3 % for a lane that follows refreshes, 0.3 % for two that do not
    std::vector<double> rates;
    double used = used_share(0.005, {{100, 300}, {20, 50, true}, {100, 50, true}}, &rates);
    CHECK(used <= 0.0051 && used > 0.0045);
    CHECK(std::abs(rates[0] - 10) < 0.1);
    CHECK(std::abs(rates[1] - 50 / 1.5) < 1 && std::abs(rates[2] - 10 / 1.5) < 0.5);

    // given 0.8 % and 0.4 %: a fourth of that is what these come down to
    rates.clear();
    used = used_share(0.005, {{100, 800}, {20, 80, true}}, &rates);
    CHECK(used <= 0.0051 && used > 0.0045);
    CHECK(std::abs(rates[0] - 5) < 0.3 && std::abs(rates[1] - 12.5) < 0.5);
}

TEST(budget_gives_flexible_lanes_half) {
    // given 0.1 % for a lane that follows refreshes, 0.4 % for one that does not
    std::vector<double> rates;
    double used = used_share(0.005, {{100, 100}, {20, 80, true}}, &rates);
    CHECK(std::abs(used - 0.0035) < 1e-4);
    CHECK(std::abs(rates[0] - 10) < 0.1 && std::abs(rates[1] - 50 / 1.6) < 1);

    // given 1.6 %, of which a fourth is more than that half
    rates.clear();
    used = used_share(0.005, {{100, 50}, {20, 320, true}}, &rates);
    CHECK(std::abs(used - 0.0045) < 1e-4);
    CHECK(std::abs(rates[0] - 10) < 0.1 && std::abs(rates[1] - 12.5) < 0.3);
}

TEST(budget_follows_what_a_lane_wants) {
    // given a lane that is throttled, and then wants less than it may
    const auto budget = std::make_shared<pepr::CpuBudget>(0.005);
    pepr::Throttle throttle(budget);
    std::int64_t t_ns = 0, cpu_ns = 0;
    const auto live = [&](std::int64_t wanted_ns, std::int64_t until_ns) {
        for (; t_ns < until_ns; t_ns += std::max(wanted_ns, throttle.min_spacing_ns())) {
            cpu_ns += 200'000;
            if (throttle.count_read(t_ns, throttle.min_spacing_ns() > wanted_ns))
                throttle.end_window(t_ns, cpu_ns, false);
        }
    };
    live(10 * kMs, 10 * kNsPerS);
    CHECK(near(throttle.min_spacing_ns(), 40 * kMs, 0.05));
    live(50 * kMs, 20 * kNsPerS);
    CHECK(throttle.min_spacing_ns() == 0);
    live(10 * kMs, 30 * kNsPerS);
    CHECK(near(throttle.min_spacing_ns(), 40 * kMs, 0.05));
}

TEST(budget_that_suffices_slows_down_nothing) {
    std::vector<double> rates;
    const double used = used_share(0.005, {{20, 20}, {100, 100}}, &rates);
    CHECK(std::abs(used - 0.002) < 1e-4);
    CHECK(std::abs(rates[0] - 50) < 0.1 && std::abs(rates[1] - 10) < 0.1);
}

TEST(budget_too_small_still_reads_before_a_gap) {
    std::vector<double> rates;
    used_share(0.0001, {{20, 5000}}, &rates);
    CHECK(rates[0] > 1.0);
}

TEST(budget_does_not_count_the_start) {
    const auto budget = std::make_shared<pepr::CpuBudget>(0.005);
    pepr::Throttle throttle(budget);
    // 50 % of a core in the first second, next to nothing afterwards
    for (std::int64_t t_ns = 0; t_ns <= 5 * kNsPerS; t_ns += 10 * kMs) {
        const std::int64_t cpu_ns =
            std::min(t_ns, kNsPerS) / 2 + std::max<std::int64_t>(0, t_ns - kNsPerS) / 1000;
        if (throttle.count_read(t_ns, false)) throttle.end_window(t_ns, cpu_ns, false);
        CHECK(throttle.min_spacing_ns() == 0);
    }
}

}  // namespace
