// Rounds energy for users who must not see it finely, because they could learn secrets from it
// (CVE-2020-8694).
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "sensors/sensor.h"

namespace pepr {

struct Coarse {
    std::int64_t period_ns;  // at most one row in this time
    double quantum_j;        // energy counters are rounded down to a multiple of it
};

// Makes the coarse rows from all rows. The energy between any two coarse rows is wrong by less than
// one quantum, however many rows lie between them, wraps included, because the rounding errors of a
// counter do not add up. Other numbers keep their value: a driver averages them over more than a
// period (docs/daemon.md).
class Coarsener {
public:
    Coarsener(const std::vector<Channel>& channels, Coarse how)
        : period_ns_(how.period_ns), row_(channels.size()), quanta_(channels.size()) {
        for (std::size_t c = 0; c < channels.size(); ++c)
            if (channels[c].quantity == "energy") quanta_[c] = quantum_of(how, channels[c].scale);
    }

    // The coarse row for this one; nullptr: too soon after the last coarse row.
    const double* coarsen(std::int64_t t_ns, const std::vector<double>& row) noexcept {
        if (t_ns < next_ns_) return nullptr;
        next_ns_ = t_ns + period_ns_;
        for (std::size_t c = 0; c < row_.size(); ++c)
            row_[c] = quanta_[c] == 0 ? row[c] : std::floor(row[c] / quanta_[c]) * quanta_[c];
        return row_.data();
    }

private:
    // In raw counts, which are whole: at least one. NaN for a scale that makes no sense, so that
    // nothing of the counter is shown.
    static double quantum_of(const Coarse& how, double scale) noexcept {
        if (!(scale > 0)) return std::nan("");
        return std::fmax(1, std::round(how.quantum_j / scale));
    }

    std::int64_t period_ns_, next_ns_ = 0;
    std::vector<double> row_, quanta_;  // a quantum of 0: no energy, and so not rounded
};

}  // namespace pepr
