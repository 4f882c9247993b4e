#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "sensors/sensor.h"

namespace pepr {

// How finely energy may be told to whoever could learn secrets from it (CVE-2020-8694).
struct Coarse {
    std::int64_t period_ns;  // at most one row in this time
    double quantum_j;        // energy counters are rounded down to a multiple of it
};

// Makes the rows for those readers. Rounding down a counter telescopes: the energy between any two
// rows is off by less than one quantum, however many rows lie between them, wraps included. Gauges
// keep their value: a driver averages them over more than a period (docs/daemon.md).
class Coarsener {
public:
    Coarsener(const std::vector<Channel>& channels, Coarse how)
        : period_ns_(how.period_ns), row_(channels.size()), quanta_(channels.size()) {
        for (std::size_t c = 0; c < channels.size(); ++c)
            if (channels[c].quantity == "energy" && channels[c].scale > 0)  // counts are whole
                quanta_[c] = std::round(how.quantum_j / channels[c].scale);
    }

    // The row to tell, or nullptr: too soon after the one before.
    const double* take(std::int64_t t_ns, const std::vector<double>& row) noexcept {
        if (t_ns < next_ns_) return nullptr;
        next_ns_ = t_ns + period_ns_;
        for (std::size_t c = 0; c < row_.size(); ++c)
            row_[c] = quanta_[c] > 0 ? std::floor(row[c] / quanta_[c]) * quanta_[c] : row[c];
        return row_.data();
    }

private:
    std::int64_t period_ns_, next_ns_ = 0;
    std::vector<double> row_, quanta_;
};

}  // namespace pepr
