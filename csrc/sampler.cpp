#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <stdexcept>

#include <linux/futex.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include "cadence.h"
#include "clock.h"
#include "privileges.h"

namespace pepr {

namespace {

constexpr std::int64_t kRingNs = 60 * kNsPerS;  // what a stalled reader may miss without loss
constexpr std::int64_t kMinRows = 1024;
constexpr std::int64_t kMaxRows = 1 << 20;
constexpr std::int64_t kDutyFactor = 3;  // a lane that learns is in its driver a quarter at most

// Sleeps until `word` differs from `expected` or CLOCK_MONOTONIC reaches `deadline_ns`. A futex is
// the one sleep with both an absolute deadline and a predicate; it costs what clock_nanosleep does.
void wait_while(const std::atomic<std::uint32_t>& word, std::uint32_t expected,
                std::int64_t deadline_ns) noexcept {
    static_assert(sizeof(word) == sizeof(std::uint32_t));
    const timespec deadline = to_timespec(deadline_ns);
    while (word.load(std::memory_order_acquire) == expected && now_ns() < deadline_ns)
        ::syscall(SYS_futex, &word, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, expected, &deadline,
                  nullptr, FUTEX_BITSET_MATCH_ANY);
}

void wake_all(std::atomic<std::uint32_t>& word) noexcept {
    ::syscall(SYS_futex, &word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, INT32_MAX);
}

}  // namespace

struct Sampler::Shared {
    Shared(std::string spec_, std::int64_t period, bool learns, std::shared_ptr<Budget> budget,
           std::optional<Coarse> coarse_, bool relinquish_)
        : spec(std::move(spec_)),
          period_ns(period),
          learn(learns),
          relinquish(relinquish_),
          coarse(coarse_),
          throttle(std::move(budget)) {}

    const std::string spec;
    const std::int64_t period_ns;
    const bool learn, relinquish;
    const std::optional<Coarse> coarse;
    Throttle throttle;  // the thread's alone
    std::atomic<std::uint32_t> state{static_cast<std::uint32_t>(State::kOpening)};
    std::atomic<std::uint32_t> stop{0};
    // Counters with one writer, the thread; readers want recent values, not an order: relaxed.
    std::atomic<std::uint64_t> samples{0}, late{0}, skipped{0}, failed_reads{0};
    std::atomic<std::uint64_t> settled{0}, wasted{0};
    std::atomic<std::int64_t> cpu_ns{0}, refresh_ns{0}, gap_ns{0};
    // Written by the thread before `state` leaves kOpening (release), read after (acquire).
    std::unique_ptr<Sensor> sensor;
    std::unique_ptr<Ring> ring, coarse_ring;
    std::unique_ptr<Coarsener> coarsener;
    std::exception_ptr error;

    State now_in() const noexcept {
        return static_cast<State>(state.load(std::memory_order_acquire));
    }

    void enter(State next) noexcept {
        state.store(static_cast<std::uint32_t>(next), std::memory_order_release);
        wake_all(state);
    }

    void run() noexcept {
        ::pthread_setname_np(::pthread_self(), "pepr-sampler");
        // The default slack of 50 µs would make every wake-up that late (median 62 µs against 12).
        ::prctl(PR_SET_TIMERSLACK, 1);
        std::vector<double> row;
        try {
            sensor = open_sensor(spec);
            if (relinquish) keep_capabilities(0);
            row.assign(sensor->channels().size(), kUnknown);
            ring = make_ring(period_ns);
            if (coarse) {
                coarse_ring = make_ring(std::max(period_ns, coarse->period_ns));
                coarsener = std::make_unique<Coarsener>(sensor->channels(), *coarse);
            }
        } catch (...) {
            error = std::current_exception();
            enter(State::kFailed);
            return;
        }
        Cadence cadence(sensor->channels(), period_ns);
        loop(row, learn && cadence.watches() ? &cadence : nullptr);
        enter(State::kStopped);
    }

    std::unique_ptr<Ring> make_ring(std::int64_t gap_ns) const {
        const auto rows = std::clamp(kRingNs / gap_ns, kMinRows, kMaxRows);
        return std::make_unique<Ring>(sensor->channels().size(), static_cast<std::size_t>(rows));
    }

    void loop(std::vector<double>& row, Cadence* cadence) noexcept {
        std::int64_t deadline_ns = now_ns(), wait_ns = period_ns;
        for (bool first = true;; first = false) {
            const bool last = stop.load(std::memory_order_acquire) != 0;
            const std::int64_t begin_ns = now_ns();
            if (last) sensor->finish();
            sensor->poll(row.data());
            const std::int64_t end_ns = now_ns();
            ring->push(begin_ns, end_ns - begin_ns, row.data());
            if (coarsener != nullptr)
                if (const double* told = coarsener->take(begin_ns, row))
                    coarse_ring->push(begin_ns, end_ns - begin_ns, told);
            count(row, begin_ns - deadline_ns, wait_ns);
            if (throttle.read(end_ns)) meter(end_ns);
            if (first) {
                cpu_ns.store(read_clock_ns(CLOCK_THREAD_CPUTIME_ID), std::memory_order_relaxed);
                enter(State::kRunning);
            }
            if (last) return meter(end_ns);
            const std::int64_t next_ns = cadence != nullptr
                                             ? follow(*cadence, row.data(), begin_ns, end_ns)
                                             : next_on_grid(deadline_ns, end_ns);
            wait_ns = next_ns - begin_ns;
            deadline_ns = next_ns;
            wait_while(stop, 0, deadline_ns);
        }
    }

    std::int64_t next_on_grid(std::int64_t deadline_ns, std::int64_t end_ns) noexcept {
        const std::int64_t step_ns = std::max(period_ns, throttle.gap_ns());
        deadline_ns += step_ns;
        if (end_ns < deadline_ns) return deadline_ns;
        const std::int64_t passed = (end_ns - deadline_ns) / step_ns + 1;
        bump(skipped, static_cast<std::uint64_t>(passed));
        return deadline_ns + passed * step_ns;
    }

    std::int64_t follow(Cadence& cadence, const double* row, std::int64_t begin_ns,
                        std::int64_t end_ns) noexcept {
        const bool settled_before = cadence.settled();
        const bool changed = cadence.saw(begin_ns, row);
        if (settled_before) {
            bump(settled, 1);
            if (!changed) bump(wasted, 1);
        }
        refresh_ns.store(cadence.refresh_ns(), std::memory_order_relaxed);
        // Drivers hold locks while they read, which the program may be waiting for.
        const std::int64_t free_ns = end_ns + kDutyFactor * (end_ns - begin_ns);
        return std::max({cadence.next_ns(), begin_ns + throttle.gap_ns(), free_ns});
    }

    void meter(std::int64_t t_ns) noexcept {
        const std::int64_t used_ns = read_clock_ns(CLOCK_THREAD_CPUTIME_ID);
        cpu_ns.store(used_ns, std::memory_order_relaxed);
        throttle.account(t_ns, used_ns);
        gap_ns.store(throttle.gap_ns(), std::memory_order_relaxed);
    }

    static void bump(std::atomic<std::uint64_t>& counter, std::uint64_t by) noexcept {
        counter.store(counter.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
    }

    void count(const std::vector<double>& row, std::int64_t lateness_ns,
               std::int64_t wait_ns) noexcept {
        bump(samples, 1);
        if (2 * lateness_ns > wait_ns) bump(late, 1);
        const auto unknown =
            std::count_if(row.begin(), row.end(), [](double x) { return std::isnan(x); });
        if (unknown > 0) bump(failed_reads, static_cast<std::uint64_t>(unknown));
    }
};

Sampler::Sampler(std::string spec, std::int64_t period_ns, bool learn,
                 std::shared_ptr<Budget> budget, std::optional<Coarse> coarse, bool relinquish)
    : shared_(std::make_shared<Shared>(std::move(spec), period_ns, learn, std::move(budget), coarse,
                                       relinquish)),
      owner_pid_(::getpid()) {
    thread_.emplace([shared = shared_] { shared->run(); });
}

Sampler::~Sampler() {
    if (thread_ && owner_pid_ != ::getpid()) {
        // A forked child has our memory but not the thread: there is nothing to join, and nothing
        // that may be freed under the parent's feet. The handle is leaked on purpose.
        new std::thread(std::move(*thread_));
        return;
    }
    stop(kNsPerS);
}

bool Sampler::wait_ready(std::int64_t timeout_ns) const {
    constexpr auto opening = static_cast<std::uint32_t>(State::kOpening);
    wait_while(shared_->state, opening, now_ns() + timeout_ns);
    if (shared_->now_in() == State::kFailed) std::rethrow_exception(shared_->error);
    return shared_->now_in() != State::kOpening;
}

bool Sampler::stop(std::int64_t timeout_ns) {
    if (!thread_) return true;
    if (owner_pid_ != ::getpid()) return false;
    shared_->stop.store(1, std::memory_order_release);  // pairs with loop() and wait_while()
    wake_all(shared_->stop);
    const std::int64_t deadline_ns = now_ns() + timeout_ns;
    for (State s = state(); s == State::kOpening || s == State::kRunning; s = state()) {
        if (now_ns() >= deadline_ns) {
            thread_->detach();
            thread_.reset();
            return false;
        }
        wait_while(shared_->state, static_cast<std::uint32_t>(s), deadline_ns);
    }
    thread_->join();
    thread_.reset();
    return true;
}

Sampler::State Sampler::state() const noexcept { return shared_->now_in(); }

const Sampler::Shared& Sampler::opened() const {
    const State s = shared_->now_in();
    if (s == State::kFailed) std::rethrow_exception(shared_->error);
    if (s == State::kOpening)
        throw SensorError("sensor '" + shared_->spec + "' is not open yet",
                          "its driver is still starting", "wait for it, or drop it from --sensor");
    return *shared_;
}

const std::vector<Channel>& Sampler::channels() const { return opened().sensor->channels(); }
const std::vector<Note>& Sampler::notes() const { return opened().sensor->notes(); }
std::size_t Sampler::width() const { return opened().ring->width(); }
std::uint64_t Sampler::waiting() const { return opened().ring->head() - cursor_; }
int Sampler::share(bool coarse) const {
    const Shared& shared = opened();
    if (coarse && !shared.coarse_ring) throw std::logic_error("this lane is not told coarsely");
    return (coarse ? shared.coarse_ring : shared.ring)->share();
}
std::size_t Sampler::read(const Ring::Columns& out) {
    return opened().ring->read(cursor_, out, lost_);
}

Sampler::Stats Sampler::stats() const noexcept {
    constexpr auto relaxed = std::memory_order_relaxed;
    return {shared_->samples.load(relaxed),
            shared_->late.load(relaxed),
            shared_->skipped.load(relaxed),
            shared_->failed_reads.load(relaxed),
            lost_,
            shared_->cpu_ns.load(relaxed),
            shared_->settled.load(relaxed),
            shared_->wasted.load(relaxed),
            shared_->refresh_ns.load(relaxed),
            shared_->gap_ns.load(relaxed)};
}

}  // namespace pepr
