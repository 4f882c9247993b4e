#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace pepr {

// How far apart to read a counter that has moved at every read: up to four times the base gap while
// its steps lie about on a line, so that the reads left out would tell little; the base gap again
// with the first step off it. What flowed is in the counter either way.
class Steady {
public:
    explicit Steady(std::int64_t base_ns) : base_ns_(base_ns), spacing_ns_(base_ns) {}

    // Takes in a step of the counter over since_ns, and says how long to wait for the next one.
    std::int64_t next_spacing_ns(double step, std::int64_t since_ns) noexcept {
        const double off = step - slope_ * static_cast<double>(since_ns);
        if (std::abs(off) > kOff * slope_ * static_cast<double>(base_ns_)) {
            spacing_ns_ = base_ns_;
            run_ = 0;
        } else if (++run_ == kRun) {
            spacing_ns_ = std::min(2 * spacing_ns_, kGaps * base_ns_);
            run_ = 0;
        }
        slope_ = step / static_cast<double>(std::max<std::int64_t>(since_ns, 1));
        return spacing_ns_;
    }

private:
    static constexpr std::int64_t kGaps = 4;
    static constexpr int kRun = 16;      // steps on a line, to wait twice as long
    static constexpr double kOff = 0.5;  // base gaps' worth: beyond, a step is off the line

    std::int64_t base_ns_, spacing_ns_;
    double slope_ = 0.0;  // per ns
    int run_ = 0;
};

}  // namespace pepr
