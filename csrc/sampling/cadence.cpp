#include "sampling/cadence.h"

#include <algorithm>
#include <cmath>

namespace pepr {

namespace {

constexpr std::int64_t kMs = 1'000'000;
constexpr std::int64_t kMinSpacingNs = kMs;
constexpr std::int64_t kGiveUpNs = 10'000 * kMs;  // a search ends if nothing changes for so long
constexpr std::int64_t kLongestRestNs = 600'000 * kMs;
constexpr std::int64_t kUnchangedPowerNs = 100 * kMs;  // power that stands still may jump any time

// The time of a refresh is known to a 16th of its period. A read comes a 5th before the end of the
// window in which the refresh is expected: the one read in 5 to 10 that is too early shows that the
// refresh came later.
constexpr std::int64_t kSteps = 16;
constexpr std::int64_t kReadAhead = 5;
constexpr int kRetries = 3;         // a step apart, until a refresh counts as one without a change
constexpr int kProbeEvery = 32;     // refreshes: then look whether there is another one in between
constexpr int kMostUnexpected = 2;  // changes, until the period is learnt anew
constexpr int kLongRun = 12;        // refreshes without a read just before them: 1 in 14 by chance
constexpr int kSkips = 4;  // refreshes at a multiple of the period, until it is learnt anew

std::string device_of(const Channel& channel) {
    return channel.name.substr(0, channel.name.rfind('/'));
}

// Power that only cross-checks a counter need not be read at each of its refreshes.
bool is_watched(const Channel& channel, const std::vector<Channel>& all) {
    if (channel.quantity == "energy") return true;
    return channel.quantity == "power" &&
           std::none_of(all.begin(), all.end(), [&](const Channel& other) {
               return other.quantity == "energy" && device_of(other) == device_of(channel);
           });
}

}  // namespace

Cadence::Cadence(const std::vector<Channel>& channels, std::int64_t base_ns) : base_ns_(base_ns) {
    for (std::size_t i = 0; i < channels.size(); ++i) {
        if (!is_watched(channels[i], channels)) continue;
        Tracker tracker{};
        tracker.channel = i;
        tracker.counter = channels[i].counter;
        trackers_.push_back(tracker);
        const double range_j = channels[i].modulus * channels[i].scale;
        if (channels[i].counter && range_j > 0)
            longest_ns_ = std::min(longest_ns_,
                                   static_cast<std::int64_t>(5e8 * range_j / kMaxPlausibleW) + 1);
    }
}

bool Cadence::observe(std::int64_t t_ns, const double* row) noexcept {
    bool any = false;
    for (Tracker& tracker : trackers_) {
        const double value = row[tracker.channel];
        if (std::isnan(value)) {  // nothing to learn: wait as for a number that does not change
            tracker.due_ns = std::max(tracker.due_ns, t_ns + unchanged_spacing_ns(tracker, t_ns));
            continue;
        }
        const bool changed = value != tracker.value;
        any |= changed;
        switch (tracker.state) {
            case State::kWaiting: start_search(tracker, t_ns); break;
            case State::kSearching: search(tracker, t_ns, changed); break;
            case State::kTracking: track(tracker, t_ns, changed); break;
            case State::kEveryRead:
                tracker.unchanged_reads = changed ? 0 : tracker.unchanged_reads + 1;
                tracker.due_ns =
                    t_ns + (tracker.counter ? tracker.steady.next_ns(value - tracker.value,
                                                                     t_ns - tracker.read_ns)
                                            : base_ns_);
                if (tracker.unchanged_reads == kRetries) start_search(tracker, t_ns);
                break;
            case State::kResting:
                tracker.due_ns = t_ns + unchanged_spacing_ns(tracker, t_ns);
                if (changed && t_ns >= tracker.rest_until_ns) {
                    start_search(tracker, t_ns);
                }
                break;
        }
        if (changed) tracker.changed_ns = t_ns;
        tracker.value = value;
        tracker.read_ns = t_ns;
    }
    plan(t_ns);
    return any;
}

bool Cadence::settled() const noexcept {
    return std::none_of(trackers_.begin(), trackers_.end(), [](const Tracker& tracker) {
        return tracker.state == State::kWaiting || tracker.state == State::kSearching;
    });
}

bool Cadence::follows_none() const noexcept {
    return std::all_of(trackers_.begin(), trackers_.end(), [](const Tracker& tracker) {
        return tracker.state == State::kEveryRead || tracker.state == State::kResting;
    });
}

std::int64_t Cadence::refresh_ns() const noexcept {
    std::int64_t shortest_ns = 0;
    for (const Tracker& tracker : trackers_)
        if (tracker.period_ns > 0 && (shortest_ns == 0 || tracker.period_ns < shortest_ns))
            shortest_ns = tracker.period_ns;
    return shortest_ns;
}

// --- searching: read after a 16th of the time since the last change, until the period is known

void Cadence::start_search(Tracker& tracker, std::int64_t t_ns) const noexcept {
    tracker.state = State::kSearching;
    tracker.period_ns = 0;
    tracker.interval_count = 0;
    tracker.seen_change = false;
    tracker.widest_ns = 0;
    tracker.changed_ns = t_ns;
    tracker.due_ns = t_ns + base_ns_;
}

void Cadence::search(Tracker& tracker, std::int64_t t_ns, bool changed) const noexcept {
    const std::int64_t since_ns = t_ns - tracker.changed_ns;
    tracker.due_ns = t_ns + (changed ? base_ns_ : unchanged_spacing_ns(tracker, t_ns));
    if (changed) {
        tracker.widest_ns = std::max(tracker.widest_ns, t_ns - tracker.read_ns);
        if (tracker.seen_change) tracker.intervals[tracker.interval_count++] = since_ns;
        tracker.seen_change = true;
        if (tracker.interval_count == kIntervals) end_search(tracker, t_ns);
    } else if (since_ns > kGiveUpNs) {
        // The device is idle, rather than its sensor slow. Search again, but not often.
        tracker.state = State::kResting;
        tracker.rest_ns = std::clamp(2 * tracker.rest_ns, kGiveUpNs, kLongestRestNs);
        tracker.rest_until_ns = t_ns + tracker.rest_ns;
    }
}

// If a refresh changes nothing, the interval is a multiple of the period: leave it out of the mean.
void Cadence::end_search(Tracker& tracker, std::int64_t t_ns) const noexcept {
    const std::int64_t shortest_ns =
        *std::min_element(tracker.intervals.begin(), tracker.intervals.end());
    const std::int64_t limit_ns = shortest_ns + shortest_ns / 2 + tracker.widest_ns;
    std::int64_t sum_ns = 0, count = 0;
    for (const std::int64_t interval_ns : tracker.intervals) {
        if (interval_ns > limit_ns) continue;
        sum_ns += interval_ns;
        ++count;
    }
    tracker.rest_ns = 0;
    tracker.unchanged_reads = 0;
    if (sum_ns / count <= base_ns_ + base_ns_ / 4) {
        tracker.state = State::kEveryRead;
        tracker.steady = SteadySpacing(base_ns_);
        return;
    }
    tracker.state = State::kTracking;
    tracker.period_ns = sum_ns / count;
    tracker.spread_ns = tracker.period_ns / 64 + tracker.widest_ns / 8;
    tracker.refreshes = tracker.late_run = tracker.skips = tracker.unexpected = 0;
    tracker.anchor_ns = 0;
    expect(tracker, tracker.read_ns + tracker.period_ns, t_ns + tracker.period_ns);
}

std::int64_t Cadence::unchanged_spacing_ns(const Tracker& tracker,
                                           std::int64_t t_ns) const noexcept {
    const std::int64_t most_ns =
        tracker.counter ? longest_ns_ : std::max(base_ns_, kUnchangedPowerNs);
    return std::min(std::max(base_ns_, (t_ns - tracker.changed_ns) / kSteps), most_ns);
}

// --- tracking: every read narrows down when the next refresh comes

void Cadence::expect(Tracker& tracker, std::int64_t soonest_ns,
                     std::int64_t latest_ns) const noexcept {
    tracker.expected_soonest_ns = tracker.soonest_ns = soonest_ns - tracker.spread_ns;
    tracker.expected_latest_ns = tracker.latest_ns = latest_ns + tracker.spread_ns;
    const std::int64_t width_ns = tracker.latest_ns - tracker.soonest_ns;
    tracker.due_ns = tracker.latest_ns - width_ns / kReadAhead;
    tracker.retries = 0;
    tracker.unchanged = 0;
    tracker.probing = false;
}

void Cadence::track(Tracker& tracker, std::int64_t t_ns, bool changed) const noexcept {
    // After a pause of more than a period (a tight budget, a stopped process), compare with the
    // last refresh that can have come.
    if (t_ns >= tracker.latest_ns + tracker.period_ns && tracker.retries == 0) {
        const std::int64_t passed = (t_ns - tracker.latest_ns) / tracker.period_ns;
        const std::int64_t by_ns = passed * tracker.period_ns;
        tracker.since_anchor += passed;
        tracker.expected_soonest_ns += by_ns;
        tracker.expected_latest_ns += by_ns;
        tracker.soonest_ns += by_ns;
        tracker.latest_ns += by_ns;
    }
    if (changed)
        on_refresh(tracker, t_ns);
    else
        on_no_change(tracker, t_ns);
}

void Cadence::on_refresh(Tracker& tracker, std::int64_t t_ns) const noexcept {
    const std::int64_t step_ns = tracker.period_ns / kSteps;
    const bool unexpected = tracker.probing || t_ns < tracker.soonest_ns - step_ns;
    tracker.skips = tracker.unchanged > 0 ? tracker.skips + 1 : 0;
    ++tracker.since_anchor;
    if (unexpected) ++tracker.unexpected;
    if (tracker.unexpected == kMostUnexpected || tracker.skips == kSkips) {
        if (t_ns >= tracker.rest_until_ns) {
            tracker.rest_until_ns = t_ns + kGiveUpNs;
            start_search(tracker, t_ns);
            return;
        }
        tracker.unexpected = tracker.skips = 0;
    }
    std::int64_t soonest_ns = std::max(tracker.soonest_ns, tracker.read_ns);
    std::int64_t latest_ns = std::min(tracker.latest_ns, t_ns);
    if (soonest_ns >= latest_ns) {
        soonest_ns = tracker.read_ns;
        latest_ns = t_ns;
    } else if (soonest_ns > tracker.expected_soonest_ns && !unexpected) {
        adjust_period(tracker, (soonest_ns + latest_ns) / 2);
    }
    // If no read is too early for long, the refresh drifts away: the window has to move faster.
    const std::int64_t spread_ns = tracker.spread_ns;
    tracker.spread_ns =
        ++tracker.late_run > kLongRun ? spread_ns + spread_ns / 4 : spread_ns - spread_ns / 64;
    tracker.spread_ns =
        std::clamp(tracker.spread_ns, tracker.period_ns / 512, tracker.period_ns / 32);
    expect(tracker, soonest_ns + tracker.period_ns, latest_ns + tracker.period_ns);
    if (unexpected || ++tracker.refreshes % kProbeEvery == 0) {
        tracker.probing = true;
        tracker.due_ns = t_ns + tracker.period_ns / 2;
    }
}

// Called for a refresh that reads bound from both sides. Two of these give the period.
void Cadence::adjust_period(Tracker& tracker, std::int64_t refresh_ns) const noexcept {
    if (tracker.anchor_ns > 0) {
        const std::int64_t off_ns =
            refresh_ns - tracker.anchor_ns - tracker.since_anchor * tracker.period_ns;
        tracker.period_ns += off_ns / (tracker.since_anchor + kSteps / 2);
    }
    tracker.anchor_ns = refresh_ns;
    tracker.since_anchor = 0;
}

void Cadence::on_no_change(Tracker& tracker, std::int64_t t_ns) const noexcept {
    tracker.soonest_ns = std::max(tracker.soonest_ns, std::min(t_ns, tracker.latest_ns));
    if (t_ns < tracker.due_ns) return;
    tracker.late_run = 0;
    if (tracker.probing) {
        tracker.probing = false;
        tracker.unexpected = 0;
        tracker.due_ns = tracker.latest_ns - (tracker.latest_ns - tracker.soonest_ns) / kReadAhead;
    } else if (t_ns < tracker.latest_ns) {
        tracker.due_ns = tracker.latest_ns;
    } else if (tracker.unchanged < 2 && ++tracker.retries <= kRetries) {  // it is late
        const std::int64_t step_ns = std::max(tracker.period_ns / kSteps, kMinSpacingNs);
        tracker.spread_ns = std::min(2 * tracker.spread_ns, tracker.period_ns / 32);
        tracker.latest_ns = tracker.due_ns = t_ns + step_ns;
    } else {  // it came, and changed nothing
        const int unchanged = tracker.unchanged;
        ++tracker.since_anchor;
        expect(tracker, tracker.expected_soonest_ns + tracker.period_ns,
               tracker.expected_latest_ns + tracker.period_ns);
        const std::int64_t most_ns = tracker.latest_ns - tracker.period_ns;
        tracker.soonest_ns = std::max(tracker.soonest_ns, most_ns);
        tracker.expected_soonest_ns = tracker.soonest_ns;
        tracker.due_ns = tracker.latest_ns;
        tracker.unchanged = unchanged + 1;
    }
}

// Reads after the last of the refreshes that are due, but before the second refresh of any number.
void Cadence::plan(std::int64_t t_ns) noexcept {
    std::int64_t due_ns = t_ns, limit_ns = t_ns + longest_ns_;
    for (const Tracker& tracker : trackers_) {
        if (tracker.state != State::kTracking) {
            limit_ns = std::min(limit_ns, tracker.due_ns);
            continue;
        }
        if (tracker.unchanged < kSkips) due_ns = std::max(due_ns, tracker.due_ns);
        // A probe later than planned is useless.
        const std::int64_t second_ns =
            tracker.soonest_ns + tracker.period_ns - tracker.period_ns / kSteps;
        const bool now = tracker.probing || tracker.unchanged >= kSkips;
        limit_ns = std::min(limit_ns, now ? tracker.due_ns : std::max(second_ns, tracker.due_ns));
    }
    if (due_ns == t_ns) due_ns = limit_ns;  // nothing tracked changes
    next_ns_ = std::max(std::min(due_ns, limit_ns), t_ns + kMinSpacingNs);
}

}  // namespace pepr
