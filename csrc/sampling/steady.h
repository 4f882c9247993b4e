// How far apart to read a counter that changes at every read: further apart while it grows
// steadily.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace pepr {

// The spacing doubles, up to four times the base, after each 16 steps in a row that lie about on a
// straight line, so that little is lost with the reads left out. The first step off the line resets
// it to the base. No energy is lost either way, because the counter keeps it.
//
// tests/sim/virtual.py has the same rule, for simulated recordings; test_sim.py compares the two.
class SteadySpacing {
public:
    explicit SteadySpacing(std::int64_t base_ns) : base_ns_(base_ns), spacing_ns_(base_ns) {}

    // The time until the next read, after a step of the counter within since_ns.
    std::int64_t next_ns(double step, std::int64_t since_ns) noexcept {
        const double off = step - slope_ * static_cast<double>(since_ns);
        if (std::abs(off) > kTolerance * slope_ * static_cast<double>(base_ns_)) {
            spacing_ns_ = base_ns_;
            steps_on_line_ = 0;
        } else if (++steps_on_line_ == kStepsToDouble) {
            spacing_ns_ = std::min(2 * spacing_ns_, kMostBases * base_ns_);
            steps_on_line_ = 0;
        }
        slope_ = step / static_cast<double>(std::max<std::int64_t>(since_ns, 1));
        return spacing_ns_;
    }

private:
    static constexpr std::int64_t kMostBases = 4;
    static constexpr int kStepsToDouble = 16;
    static constexpr double kTolerance = 0.5;  // of a step at the base; beyond, it is off the line

    std::int64_t base_ns_, spacing_ns_;
    double slope_ = 0.0;  // per ns, of the last step
    int steps_on_line_ = 0;
};

}  // namespace pepr
