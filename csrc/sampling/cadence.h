#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "sampling/steady.h"
#include "sensors/sensor.h"

namespace pepr {

// No package, memory or board draws more.
constexpr double kMaxPlausibleW = 20'000.0;

// However slow a sensor, and however tight the budget: a lane is read at least this often. Shorter
// than what counts as a gap (1 s), and than the time in which 20 kW fill half of the smallest RAPL
// range known (65.7 kJ): no wrap passes unseen.
constexpr std::int64_t kMaxSpacingNs = 800'000'000;

// Learns when the numbers of a lane are refreshed, from when they change, and says when to read
// next: as late as no refresh is overwritten unread, and then just after the refresh that is due
// last. One device is read just after its refresh; of several with phases of their own each is read
// once a refresh, by rows that are common to all.
//
// It watches energy counters, and the power readings of devices that have none. Pure and in whole
// ns: no clock, no thread; nothing is allocated after construction.
class Cadence {
public:
    // `base_ns`: reads while it searches, and of counters that change at every read. These are read
    // more seldom, up to four times, while their power is steady.
    Cadence(const std::vector<Channel>& channels, std::int64_t base_ns);

    // Takes in what was read at t_ns. True if a number that is watched had changed.
    bool saw(std::int64_t t_ns, const double* row) noexcept;

    std::int64_t next_ns() const noexcept { return next_ns_; }
    bool watches() const noexcept { return !trackers_.empty(); }
    bool settled() const noexcept;         // no search is going on
    bool waits_for_none() const noexcept;  // no refresh is searched, nor read just after it
    std::int64_t longest_ns() const noexcept { return longest_ns_; }  // between two reads
    std::int64_t refresh_ns() const noexcept;  // the shortest that was learnt, 0: none

private:
    static constexpr std::size_t kIntervals = 6;  // between changes, to learn a period from

    enum class State { kWaiting, kSearching, kTracking, kEveryRead, kResting };

    struct Tracker {
        std::size_t channel;
        bool counter;
        State state = State::kWaiting;  // for a first value
        double value = kUnknown;
        std::int64_t read_ns = 0;     // of that value, last
        std::int64_t changed_ns = 0;  // when a change was seen last
        std::int64_t due_ns = 0;

        // While it searches.
        std::array<std::int64_t, kIntervals> intervals{};
        std::size_t known = 0;
        bool edge = false;
        std::int64_t widest_ns = 0;
        std::int64_t rest_ns = 0, rest_until_ns = 0;

        Steady steady{0};  // while every read sees a change

        // While it tracks: the next refresh lies in (soonest, latest], as expected and as known
        // since. `spread` is how much a refresh may be off from the last one plus the period.
        std::int64_t period_ns = 0, spread_ns = 0;
        std::int64_t expected_soonest_ns = 0, expected_latest_ns = 0;
        std::int64_t soonest_ns = 0, latest_ns = 0;
        std::int64_t pinned_ns = 0, refreshes = 0;  // a refresh known from both sides, and since
        int hits = 0, run = 0, tries = 0, still = 0, skips = 0, early = 0, unchanged = 0;
        bool probing = false;
    };

    void search(Tracker&, std::int64_t t_ns) const noexcept;
    void searched(Tracker&, std::int64_t t_ns, bool changed) const noexcept;
    void conclude(Tracker&, std::int64_t t_ns) const noexcept;
    void tracked(Tracker&, std::int64_t t_ns, bool changed) const noexcept;
    void hit(Tracker&, std::int64_t t_ns) const noexcept;
    void pin(Tracker&, std::int64_t at_ns) const noexcept;
    void missed(Tracker&, std::int64_t t_ns) const noexcept;
    void expect(Tracker&, std::int64_t soonest_ns, std::int64_t latest_ns) const noexcept;
    std::int64_t unchanged_spacing_ns(const Tracker&, std::int64_t t_ns) const noexcept;
    void plan(std::int64_t t_ns) noexcept;

    std::vector<Tracker> trackers_;
    std::int64_t base_ns_;
    std::int64_t longest_ns_ = kMaxSpacingNs;
    std::int64_t next_ns_ = 0;
};

}  // namespace pepr
