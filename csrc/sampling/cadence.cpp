#include "sampling/cadence.h"

#include <algorithm>
#include <cmath>

namespace pepr {

namespace {

constexpr std::int64_t kMs = 1'000'000;
constexpr std::int64_t kMinSpacingNs = kMs;
constexpr std::int64_t kGiveUpNs = 10'000 * kMs;  // a search in which nothing changes for so long
constexpr std::int64_t kLongestRestNs = 600'000 * kMs;
constexpr std::int64_t kStillPowerNs = 100 * kMs;  // a power that stands still may jump any time

// A refresh is told apart to a 16th of its period; a read is put a 5th before the end of the window
// in which the refresh is expected: the one in 5 or 10 that comes too early bounds it from below.
constexpr std::int64_t kSteps = 16;
constexpr std::int64_t kReadAhead = 5;
constexpr int kTries = 3;        // a step apart, before a refresh is taken to have changed nothing
constexpr int kProbeEvery = 32;  // refreshes, to see whether there is another in between
constexpr int kDoubts = 2;       // changes where none should be, until a period is learnt anew
constexpr int kLongRun = 12;     // refreshes none of which was read too early: 1 in 14 by chance
constexpr int kSkips = 4;        // refreshes found at a multiple of the period, likewise

std::string device_of(const Channel& channel) {
    return channel.name.substr(0, channel.name.rfind('/'));
}

// Power that is only a cross-check of a counter need not be read at each of its refreshes.
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

bool Cadence::saw(std::int64_t t_ns, const double* row) noexcept {
    bool any = false;
    for (Tracker& tracker : trackers_) {
        const double value = row[tracker.channel];
        if (std::isnan(value)) {  // nothing was learnt; wait as one does for a number at rest
            tracker.due_ns = std::max(tracker.due_ns, t_ns + unchanged_spacing_ns(tracker, t_ns));
            continue;
        }
        const bool changed = value != tracker.value;
        any |= changed;
        switch (tracker.state) {
            case State::kWaiting: search(tracker, t_ns); break;
            case State::kSearching: searched(tracker, t_ns, changed); break;
            case State::kTracking: tracked(tracker, t_ns, changed); break;
            case State::kEveryRead:
                tracker.unchanged = changed ? 0 : tracker.unchanged + 1;
                tracker.due_ns =
                    t_ns + (tracker.counter ? tracker.steady.next_spacing_ns(value - tracker.value,
                                                                             t_ns - tracker.read_ns)
                                            : base_ns_);
                if (tracker.unchanged == kTries) search(tracker, t_ns);
                break;
            case State::kResting:
                tracker.due_ns = t_ns + unchanged_spacing_ns(tracker, t_ns);
                if (changed && t_ns >= tracker.rest_until_ns) {
                    search(tracker, t_ns);
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

bool Cadence::waits_for_none() const noexcept {
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

// --- searching: read at a 16th of the time since the last change, until the period shows

void Cadence::search(Tracker& tracker, std::int64_t t_ns) const noexcept {
    tracker.state = State::kSearching;
    tracker.period_ns = 0;
    tracker.known = 0;
    tracker.edge = false;
    tracker.widest_ns = 0;
    tracker.changed_ns = t_ns;
    tracker.due_ns = t_ns + base_ns_;
}

void Cadence::searched(Tracker& tracker, std::int64_t t_ns, bool changed) const noexcept {
    const std::int64_t since_ns = t_ns - tracker.changed_ns;
    tracker.due_ns = t_ns + (changed ? base_ns_ : unchanged_spacing_ns(tracker, t_ns));
    if (changed) {
        tracker.widest_ns = std::max(tracker.widest_ns, t_ns - tracker.read_ns);
        if (tracker.edge) tracker.intervals[tracker.known++] = since_ns;
        tracker.edge = true;
        if (tracker.known == kIntervals) conclude(tracker, t_ns);
    } else if (since_ns > kGiveUpNs) {
        // A device at rest, not a slow sensor: how often it is searched is bounded.
        tracker.state = State::kResting;
        tracker.rest_ns = std::clamp(2 * tracker.rest_ns, kGiveUpNs, kLongestRestNs);
        tracker.rest_until_ns = t_ns + tracker.rest_ns;
    }
}

// A refresh that changes nothing leaves a multiple of the period: those are left out of the mean.
void Cadence::conclude(Tracker& tracker, std::int64_t t_ns) const noexcept {
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
    tracker.unchanged = 0;
    if (sum_ns / count <= base_ns_ + base_ns_ / 4) {
        tracker.state = State::kEveryRead;
        tracker.steady = Steady(base_ns_);
        return;
    }
    tracker.state = State::kTracking;
    tracker.period_ns = sum_ns / count;
    tracker.spread_ns = tracker.period_ns / 64 + tracker.widest_ns / 8;
    tracker.hits = tracker.run = tracker.skips = tracker.early = 0;
    tracker.pinned_ns = 0;
    expect(tracker, tracker.read_ns + tracker.period_ns, t_ns + tracker.period_ns);
}

std::int64_t Cadence::unchanged_spacing_ns(const Tracker& tracker,
                                           std::int64_t t_ns) const noexcept {
    const std::int64_t most_ns = tracker.counter ? longest_ns_ : std::max(base_ns_, kStillPowerNs);
    return std::min(std::max(base_ns_, (t_ns - tracker.changed_ns) / kSteps), most_ns);
}

// --- tracking: bounds of the next refresh, tightened by every read

void Cadence::expect(Tracker& tracker, std::int64_t soonest_ns,
                     std::int64_t latest_ns) const noexcept {
    tracker.expected_soonest_ns = tracker.soonest_ns = soonest_ns - tracker.spread_ns;
    tracker.expected_latest_ns = tracker.latest_ns = latest_ns + tracker.spread_ns;
    const std::int64_t width_ns = tracker.latest_ns - tracker.soonest_ns;
    tracker.due_ns = tracker.latest_ns - width_ns / kReadAhead;
    tracker.tries = 0;
    tracker.still = 0;
    tracker.probing = false;
}

void Cadence::tracked(Tracker& tracker, std::int64_t t_ns, bool changed) const noexcept {
    // Not read for longer than a period (a tight budget, a program that was stopped): the refresh
    // to compare with is the last one that can have come.
    if (t_ns >= tracker.latest_ns + tracker.period_ns && tracker.tries == 0) {
        const std::int64_t passed = (t_ns - tracker.latest_ns) / tracker.period_ns;
        const std::int64_t by_ns = passed * tracker.period_ns;
        tracker.refreshes += passed;
        tracker.expected_soonest_ns += by_ns;
        tracker.expected_latest_ns += by_ns;
        tracker.soonest_ns += by_ns;
        tracker.latest_ns += by_ns;
    }
    if (changed)
        hit(tracker, t_ns);
    else
        missed(tracker, t_ns);
}

void Cadence::hit(Tracker& tracker, std::int64_t t_ns) const noexcept {
    const std::int64_t step_ns = tracker.period_ns / kSteps;
    const bool too_early = tracker.probing || t_ns < tracker.soonest_ns - step_ns;
    tracker.skips = tracker.still > 0 ? tracker.skips + 1 : 0;
    ++tracker.refreshes;
    if (too_early) ++tracker.early;
    if (tracker.early == kDoubts || tracker.skips == kSkips) {
        if (t_ns >= tracker.rest_until_ns) {
            tracker.rest_until_ns = t_ns + kGiveUpNs;
            search(tracker, t_ns);
            return;
        }
        tracker.early = tracker.skips = 0;
    }
    std::int64_t soonest_ns = std::max(tracker.soonest_ns, tracker.read_ns);
    std::int64_t latest_ns = std::min(tracker.latest_ns, t_ns);
    if (soonest_ns >= latest_ns) {
        soonest_ns = tracker.read_ns;
        latest_ns = t_ns;
    } else if (soonest_ns > tracker.expected_soonest_ns && !too_early) {
        pin(tracker, (soonest_ns + latest_ns) / 2);
    }
    // Never too early for long: it drifts away, and the window must move faster than it does.
    const std::int64_t spread_ns = tracker.spread_ns;
    tracker.spread_ns =
        ++tracker.run > kLongRun ? spread_ns + spread_ns / 4 : spread_ns - spread_ns / 64;
    tracker.spread_ns =
        std::clamp(tracker.spread_ns, tracker.period_ns / 512, tracker.period_ns / 32);
    expect(tracker, soonest_ns + tracker.period_ns, latest_ns + tracker.period_ns);
    if (too_early || ++tracker.hits % kProbeEvery == 0) {
        tracker.probing = true;
        tracker.due_ns = t_ns + tracker.period_ns / 2;
    }
}

// A refresh that was bounded by reads from both sides. Two of them tell the period.
void Cadence::pin(Tracker& tracker, std::int64_t at_ns) const noexcept {
    if (tracker.pinned_ns > 0) {
        const std::int64_t off_ns =
            at_ns - tracker.pinned_ns - tracker.refreshes * tracker.period_ns;
        tracker.period_ns += off_ns / (tracker.refreshes + kSteps / 2);
    }
    tracker.pinned_ns = at_ns;
    tracker.refreshes = 0;
}

void Cadence::missed(Tracker& tracker, std::int64_t t_ns) const noexcept {
    tracker.soonest_ns = std::max(tracker.soonest_ns, std::min(t_ns, tracker.latest_ns));
    if (t_ns < tracker.due_ns) return;
    tracker.run = 0;
    if (tracker.probing) {
        tracker.probing = false;
        tracker.early = 0;
        tracker.due_ns = tracker.latest_ns - (tracker.latest_ns - tracker.soonest_ns) / kReadAhead;
    } else if (t_ns < tracker.latest_ns) {
        tracker.due_ns = tracker.latest_ns;
    } else if (tracker.still < 2 && ++tracker.tries <= kTries) {  // late: it jitters or has slowed
        const std::int64_t step_ns = std::max(tracker.period_ns / kSteps, kMinSpacingNs);
        tracker.spread_ns = std::min(2 * tracker.spread_ns, tracker.period_ns / 32);
        tracker.latest_ns = tracker.due_ns = t_ns + step_ns;
    } else {  // it came and changed nothing
        const int still = tracker.still;
        ++tracker.refreshes;
        expect(tracker, tracker.expected_soonest_ns + tracker.period_ns,
               tracker.expected_latest_ns + tracker.period_ns);
        const std::int64_t most_ns = tracker.latest_ns - tracker.period_ns;
        tracker.soonest_ns = std::max(tracker.soonest_ns, most_ns);
        tracker.expected_soonest_ns = tracker.soonest_ns;
        tracker.due_ns = tracker.latest_ns;
        tracker.still = still + 1;
    }
}

// The last of the refreshes that are due, but no later than the second refresh of any.
void Cadence::plan(std::int64_t t_ns) noexcept {
    std::int64_t due_ns = t_ns, limit_ns = t_ns + longest_ns_;
    for (const Tracker& tracker : trackers_) {
        if (tracker.state != State::kTracking) {
            limit_ns = std::min(limit_ns, tracker.due_ns);
            continue;
        }
        if (tracker.still < kSkips) due_ns = std::max(due_ns, tracker.due_ns);
        // A probe is worth nothing later.
        const std::int64_t second_ns =
            tracker.soonest_ns + tracker.period_ns - tracker.period_ns / kSteps;
        const bool now = tracker.probing || tracker.still >= kSkips;
        limit_ns = std::min(limit_ns, now ? tracker.due_ns : std::max(second_ns, tracker.due_ns));
    }
    if (due_ns == t_ns) due_ns = limit_ns;  // nothing that is tracked moves
    next_ns_ = std::max(std::min(due_ns, limit_ns), t_ns + kMinSpacingNs);
}

}  // namespace pepr
