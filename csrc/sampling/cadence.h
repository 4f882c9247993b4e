// Learns when a lane's numbers are refreshed, and says when to read them next.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "sampling/steady.h"
#include "sensors/sensor.h"

namespace pepr {

// No package, memory or board draws more.
constexpr double kMaxPlausibleW = 20'000.0;

// The longest time between two reads, however slow the sensor and however tight the budget. It is
// less than what counts as a gap (1 s), and than the time in which 20 kW fill half of the
// smallest RAPL range known (65.7 kJ), so that no wrap is missed.
constexpr std::int64_t kMaxSpacingNs = 800'000'000;

// It learns from when the numbers change. Reads come as late as possible without missing a refresh:
// just after the refresh that is due last. So a single device is read just after each refresh; of
// several devices with different phases each is read once a refresh, in rows common to all.
//
// It watches energy counters, and the power of devices that have no counter. It has no clock and no
// thread, computes in whole ns, and does not allocate after construction.
class Cadence {
public:
    // `base_ns`: the time between reads during a search, and for counters that change at every read
    // (up to four times that while their power is steady).
    Cadence(const std::vector<Channel>& channels, std::int64_t base_ns);

    // Takes in a row read at t_ns. True if a watched number had changed.
    bool observe(std::int64_t t_ns, const double* row) noexcept;

    std::int64_t next_ns() const noexcept { return next_ns_; }
    bool watches_any() const noexcept { return !trackers_.empty(); }
    bool settled() const noexcept;       // no search is going on
    bool follows_none() const noexcept;  // no refresh is searched or waited for
    std::int64_t longest_ns() const noexcept { return longest_ns_; }  // between two reads
    std::int64_t refresh_ns() const noexcept;  // the shortest refresh period learnt; 0: none

private:
    static constexpr std::size_t kIntervals = 6;  // between changes, to learn a period from

    enum class State { kWaiting, kSearching, kTracking, kEveryRead, kResting };

    // What is known of one watched number.
    struct Tracker {
        std::size_t channel;
        bool counter;
        State state = State::kWaiting;  // for the first value
        double value = kUnknown;
        std::int64_t read_ns = 0;     // when this value was read last
        std::int64_t changed_ns = 0;  // when a change was seen last
        std::int64_t due_ns = 0;      // when to read next

        // kSearching and kResting: the intervals between changes so far, and the longest time
        // between two reads within which one of them was seen to change.
        std::array<std::int64_t, kIntervals> intervals{};
        std::size_t interval_count = 0;
        bool seen_change = false;
        std::int64_t widest_ns = 0;
        std::int64_t rest_ns = 0, rest_until_ns = 0;

        // kEveryRead.
        SteadySpacing steady{0};
        int unchanged_reads = 0;

        // kTracking: the next refresh comes within (soonest, latest]: `expected` is from the period
        // alone, the others also from the reads since. It may be `spread` off from the last refresh
        // plus the period.
        std::int64_t period_ns = 0, spread_ns = 0;
        std::int64_t expected_soonest_ns = 0, expected_latest_ns = 0;
        std::int64_t soonest_ns = 0, latest_ns = 0;
        // The last refresh that was bounded by reads from both sides, and the refreshes since.
        std::int64_t anchor_ns = 0, since_anchor = 0;
        int refreshes = 0;     // seen
        int late_run = 0;      // refreshes in a row without a read just before them
        int retries = 0;       // reads after the expected refresh that saw no change
        int unchanged = 0;     // refreshes in a row that changed nothing
        int skips = 0;         // refreshes in a row that came after such ones
        int unexpected = 0;    // changes at a time when no refresh was expected
        bool probing = false;  // the next read is to see whether there are refreshes in between
    };

    void start_search(Tracker&, std::int64_t t_ns) const noexcept;
    void search(Tracker&, std::int64_t t_ns, bool changed) const noexcept;
    void end_search(Tracker&, std::int64_t t_ns) const noexcept;
    void track(Tracker&, std::int64_t t_ns, bool changed) const noexcept;
    void on_refresh(Tracker&, std::int64_t t_ns) const noexcept;
    void adjust_period(Tracker&, std::int64_t refresh_ns) const noexcept;
    void on_no_change(Tracker&, std::int64_t t_ns) const noexcept;
    void expect(Tracker&, std::int64_t soonest_ns, std::int64_t latest_ns) const noexcept;
    std::int64_t unchanged_spacing_ns(const Tracker&, std::int64_t t_ns) const noexcept;
    void plan(std::int64_t t_ns) noexcept;

    std::vector<Tracker> trackers_;
    std::int64_t base_ns_;
    std::int64_t longest_ns_ = kMaxSpacingNs;
    std::int64_t next_ns_ = 0;
};

}  // namespace pepr
