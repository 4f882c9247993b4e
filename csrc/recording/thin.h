// Decides which rows of a recording have to be stored, so that the others follow from them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pepr {

// How much of a column may be left out.
struct ThinRule {
    enum class Kind {
        kLine,   // a counter: its changes lie on straight lines between the rows kept
        kHold,   // a reading that is integrated: it keeps its value until the next row kept
        kLevel,  // any other gauge: only its mean must not change
    };
    Kind kind;
    // kLine: how far a change may be off the line, in usual steps of the counter; kHold: relative;
    // kLevel: how long a time its level may be added or lost, s.
    double tolerance;
    double max_interval_s = 0.0;  // kLine: the usual interval between changes is no longer; 0: any
};

// A sensor's refresh period is learnt from its first changes: at least three, at most 16.
// energy/curve.py and commands/sensors.py use the same numbers.
constexpr std::size_t kFewestRefreshChanges = 3, kRefreshChanges = 16;

// The median interval between the first changes of a column; 0 if there are too few.
double first_interval_s(const double* values, const std::int64_t* t_ns, std::size_t n);

// The rows, in ascending order, that have to be kept of n, so that between them every column stays
// within its tolerance. It keeps:
// - the first `unthinned` rows and the last row;
// - both rows around a gap, a wrap, a reset, the end of a standstill, and where a number becomes
//   unknown or known;
// - both rows around a step off the line that took longer than usual, as power may jump within it;
// - the highest and the lowest value of a gauge;
// - one row in kThinLongestNs.
// In a kept row every counter has just changed, or has not changed at all since the last one,
// because the time of a change is the time of its row. Columns lie `stride` apart.
std::vector<std::size_t> thin(const std::vector<ThinRule>& rules, const std::int64_t* t_ns,
                              const double* values, std::size_t stride, std::size_t n,
                              std::size_t unthinned);

constexpr std::int64_t kThinLongestNs = 4'000'000'000;  // less than what counts as a stall
constexpr std::int64_t kThinGapNs = 1'000'000'000;  // between rows further apart nothing is known

}  // namespace pepr
