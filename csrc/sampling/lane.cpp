#include "sampling/lane.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "system/futex.h"
#include "system/privileges.h"

namespace pepr {

namespace {

constexpr std::int64_t kRingNs = 2 * kNsPerS;  // a stalled reader loses nothing for so long
constexpr std::int64_t kMinRows = 64, kUsualRows = 1024, kUsualBytes = 1 << 20;
constexpr std::int64_t kMaxRows = 1 << 20;
// A lane that learns is in its driver a quarter of the time at most.
constexpr std::int64_t kDutyFactor = 3;

// How much earlier or later a flexible lane may be read, in eighths of its spacing. Their sum is a
// whole spacing, so that one wake-up of another lane always fits if that is read as often. A read
// later by half a spacing would count as late.
constexpr std::int64_t kEarlierEighths = 5, kLaterEighths = 3;

void bump(std::atomic<std::uint64_t>& counter, std::uint64_t by) noexcept {
    counter.store(counter.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
}

}  // namespace

Lane::Lane(Options options, std::int64_t epoch_ns)
    : options_(std::move(options)),
      epoch_ns_(epoch_ns),
      throttle_(options_.budget),
      spacing_ns_(options_.period_ns) {}

bool Lane::open() noexcept {
    try {
        sensor_ = options_.open(options_.spec);
        if (options_.drop_capabilities) keep_capabilities(0);
        const std::vector<Channel>& channels = sensor_->channels();
        row_.assign(channels.size(), kUnknown);
        for (std::size_t c = 0; options_.notifier != nullptr && c < channels.size(); ++c)
            if (channels[c].quantity == "identity") identities_.emplace_back(c, 0.0);
        ring_ = make_ring(options_.period_ns);
        if (options_.coarse) {
            coarse_ring_ = make_ring(std::max(options_.period_ns, options_.coarse->period_ns));
            coarsener_ = std::make_unique<Coarsener>(channels, *options_.coarse);
        }
        if (options_.learn) cadence_.emplace(channels, options_.period_ns);
        if (cadence_ && !cadence_->watches_any()) cadence_.reset();
        return true;
    } catch (...) {
        error_ = std::current_exception();
        enter(State::kFailed);
        return false;
    }
}

std::unique_ptr<Ring> Lane::make_ring(std::int64_t spacing_ns) const {
    const std::size_t width = sensor_->channels().size();
    // Limited in bytes, because a ring comes to use all of its memory.
    const auto row_bytes = static_cast<std::int64_t>(8 * (width + 2));
    const std::int64_t least = std::clamp(kUsualBytes / row_bytes, kMinRows, kUsualRows);
    const auto rows = std::clamp(kRingNs / spacing_ns, least, kMaxRows);
    return std::make_unique<Ring>(width, static_cast<std::size_t>(rows));
}

void Lane::read(bool last, CpuLaps& laps) noexcept {
    const std::int64_t begin_ns = now_ns();
    if (last) sensor_->finish();
    sensor_->poll(row_.data());
    const std::int64_t end_ns = now_ns();
    took_ns_ = end_ns - begin_ns;
    ring_->push(begin_ns, took_ns_, row_.data());
    if (identity_changed()) options_.notifier->notify();
    if (coarsener_ != nullptr)
        if (const double* coarse_row = coarsener_->coarsen(begin_ns, row_))
            coarse_ring_->push(begin_ns, took_ns_, coarse_row);
    if (!started_) due_ns_ = begin_ns;
    count_sample(begin_ns - due_ns_);
    if (throttle_.count_read(end_ns, throttled_) || last) end_window(end_ns, laps);
    if (!started_) {
        charge(laps);
        enter(State::kRunning);
        started_ = true;
    }
    plan(begin_ns, end_ns);
    if (last) enter(State::kStopped);
}

bool Lane::identity_changed() noexcept {
    bool changed = false;
    for (auto& [channel, known] : identities_) {
        const double now = std::isnan(row_[channel]) ? known : row_[channel];
        changed |= now != std::exchange(known, now);
    }
    return changed;
}

void Lane::plan(std::int64_t begin_ns, std::int64_t end_ns) noexcept {
    due_ns_ = cadence_ ? next_by_cadence(begin_ns, end_ns) : next_on_grid(begin_ns, end_ns);
    earliest_ns_ = latest_ns_ = due_ns_;
    const std::int64_t spacing_ns = due_ns_ - begin_ns;
    spacing_ns_.store(spacing_ns, std::memory_order_relaxed);
    if (!is_flexible()) return;
    // The budget's minimum is between two reads, so a throttled lane must not be read earlier.
    if (throttle_.min_spacing_ns() == 0) earliest_ns_ -= kEarlierEighths * spacing_ns / 8;
    // A long period may be exceeded too: else two lanes of the same period could stay out of step.
    const std::int64_t longest_ns =
        cadence_ ? cadence_->longest_ns()
                 : std::max(kMaxSpacingNs, (8 + kLaterEighths) * options_.period_ns / 8);
    latest_ns_ = std::clamp(due_ns_ + kLaterEighths * spacing_ns / 8, due_ns_,
                            std::max(due_ns_, begin_ns + longest_ns));
}

// A lane with a budget has a period that nobody asked for.
bool Lane::is_flexible() const noexcept {
    return options_.budget != nullptr && (!cadence_ || cadence_->follows_none());
}

std::int64_t Lane::next_on_grid(std::int64_t begin_ns, std::int64_t end_ns) noexcept {
    const std::int64_t period_ns = options_.period_ns, min_spacing_ns = throttle_.min_spacing_ns();
    const std::int64_t step_ns = std::max(period_ns, min_spacing_ns);
    throttled_ = min_spacing_ns > period_ns;
    std::int64_t from_ns = due_ns_;
    if (is_flexible())
        from_ns = begin_ns;
    else if (min_spacing_ns <= period_ns)
        from_ns -= (due_ns_ - epoch_ns_) % period_ns;
    const std::int64_t next_ns = from_ns + step_ns;
    if (end_ns < next_ns) return next_ns;
    const std::int64_t passed = (end_ns - next_ns) / step_ns + 1;
    if (started_) bump(skipped_, static_cast<std::uint64_t>(passed));
    return next_ns + passed * step_ns;
}

std::int64_t Lane::next_by_cadence(std::int64_t begin_ns, std::int64_t end_ns) noexcept {
    const bool settled_before = cadence_->settled();
    const bool changed = cadence_->observe(begin_ns, row_.data());
    if (settled_before) {
        bump(settled_, 1);
        if (!changed) bump(wasted_, 1);
    }
    refresh_ns_.store(cadence_->refresh_ns(), std::memory_order_relaxed);
    // While a driver reads it holds locks that the program may be waiting for: leave it some time.
    const std::int64_t free_ns = end_ns + kDutyFactor * (end_ns - begin_ns);
    const std::int64_t wanted_ns = std::max(cadence_->next_ns(), free_ns);
    const std::int64_t allowed_ns =
        begin_ns + std::min(throttle_.min_spacing_ns(), cadence_->longest_ns());
    throttled_ = allowed_ns > wanted_ns;
    return std::max(wanted_ns, allowed_ns);
}

void Lane::charge(CpuLaps& laps) noexcept {
    cpu_ns_.fetch_add(laps.lap_ns(), std::memory_order_relaxed);
}

void Lane::end_window(std::int64_t t_ns, CpuLaps& laps) noexcept {
    charge(laps);
    throttle_.end_window(t_ns, cpu_ns_.load(std::memory_order_relaxed), is_flexible());
    min_spacing_ns_.store(throttle_.min_spacing_ns(), std::memory_order_relaxed);
}

void Lane::count_sample(std::int64_t lateness_ns) noexcept {
    bump(samples_, 1);
    if (2 * lateness_ns > spacing_ns()) bump(late_, 1);
    const auto unknown =
        std::count_if(row_.begin(), row_.end(), [](double x) { return std::isnan(x); });
    if (unknown > 0) bump(failed_reads_, static_cast<std::uint64_t>(unknown));
}

void Lane::enter(State next) noexcept {
    state_.store(static_cast<std::uint32_t>(next), std::memory_order_release);
    wake_all(state_);
}

bool Lane::wait_while_in(State state, std::int64_t deadline_ns) const noexcept {
    return wait_while(state_, static_cast<std::uint32_t>(state), deadline_ns);
}

void Lane::require_open() const {
    if (state() == State::kFailed) std::rethrow_exception(error_);
    if (state() == State::kOpening)
        throw SensorError("sensor '" + options_.spec + "' is not open yet",
                          "its driver is still starting", "wait for it, or drop it from --sensor");
}

Lane::Stats Lane::stats(std::uint64_t lost) const noexcept {
    constexpr auto relaxed = std::memory_order_relaxed;
    return {samples_.load(relaxed),
            late_.load(relaxed),
            skipped_.load(relaxed),
            failed_reads_.load(relaxed),
            lost,
            cpu_ns_.load(relaxed),
            settled_.load(relaxed),
            wasted_.load(relaxed),
            refresh_ns_.load(relaxed),
            min_spacing_ns_.load(relaxed)};
}

}  // namespace pepr
