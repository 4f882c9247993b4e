#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pepr {

// How one column of a recording may be stored more sparsely than it was read.
struct ThinRule {
    enum class Kind {
        kLine,   // a counter: its changes lie on straight lines through those that are kept
        kHold,   // a reading that is integrated: it is held until the next one that is kept
        kLevel,  // a gauge beside: only its mean level must not move
    };
    Kind kind;
    // kLine: how far a change may be off, in usual steps of the counter; kHold: relative;
    // kLevel: s, how much of its level may be added or lost.
    double tolerance;
    double most_usual_s = 0.0;  // kLine: what usual may be at most between two changes; 0: anything
};

// A sensor's refresh period is learnt from its first changes: from three at least, from 16 at most.
// energy/curve.py learns it from the same ones.
constexpr std::size_t kFewestRefreshChanges = 3, kRefreshChanges = 16;

// The median time between those changes of a column; 0 if it has too few.
double first_interval_s(const double* values, const std::int64_t* t_ns, std::size_t n);

// The rows (ascending) of a recording of n that have to be kept, so that between them every column
// is within its tolerance. Kept are: the first `whole` rows and the last; both rows around anything
// that becomes unknown or known, around a gap, a wrap, a reset, the end of a standstill, and a step
// off the line that took longer than usual, as power may jump within; the highest and the lowest
// value of a gauge; and one row in kThinLongestNs. A kept row is one in which every counter has
// just changed, or not at all, since the time of a change is that of its row. Columns lie `stride`
// apart.
std::vector<std::size_t> thin(const std::vector<ThinRule>& rules, const std::int64_t* t_ns,
                              const double* values, std::size_t stride, std::size_t n,
                              std::size_t whole);

constexpr std::int64_t kThinLongestNs = 4'000'000'000;  // less than what counts as a stall
constexpr std::int64_t kThinGapNs = 1'000'000'000;  // further apart, nobody knows what was between

}  // namespace pepr
