#include "recording/journal.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include <pthread.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "system/futex.h"

namespace pepr {

namespace {

// The first write is due after this part of the period, each later one after twice as long. A
// program that is killed early loses half of its run at most.
constexpr std::int64_t kFirstPart = 64;

}  // namespace

struct Journal::State {
    struct Entry {
        std::shared_ptr<const Lane> lane;
        std::shared_ptr<LaneFile> file;
        bool failed = false;
    };

    State(std::int64_t period_ns, std::shared_ptr<Notifier> notifier)
        : period_ns(period_ns), notifier(std::move(notifier)) {}

    const std::int64_t period_ns;
    const std::shared_ptr<Notifier> notifier;
    std::mutex mutex;
    std::vector<Entry> entries;
    std::atomic<bool> stopping{false}, begins{false};  // lanes were added
    std::atomic<std::uint32_t> changes{0};             // of these two, which wake the thread
    std::atomic<std::int64_t> cpu_ns{0};
    std::thread thread;

    void change(std::atomic<bool>& what) noexcept {
        what = true;
        ++changes;
        wake_all(changes);
    }

    void flush() {
        const std::lock_guard<std::mutex> lock(mutex);
        bool has_changed = false;
        for (Entry& entry : entries) {
            entry.file->drain(entry.lane->ring());
            entry.file->flush();
            const bool fails = entry.file->error() != 0;
            has_changed |= fails != std::exchange(entry.failed, fails);
        }
        if (has_changed) notifier->notify();
    }

    void work() noexcept {
        ::pthread_setname_np(::pthread_self(), "pepr-journal");
        std::int64_t spacing_ns = period_ns, due_ns = now_ns() + spacing_ns;
        for (;;) {
            const std::uint32_t seen = changes;
            if (stopping) return;
            if (begins.exchange(false)) {
                spacing_ns = period_ns / kFirstPart;
                due_ns = now_ns() + spacing_ns;
            }
            // Nothing waits for it, so it may be late and share a wake-up with another timer.
            ::prctl(PR_SET_TIMERSLACK, spacing_ns / 8);
            if (wait_while(changes, seen, due_ns)) continue;
            try {
                flush();
            } catch (const std::bad_alloc&) {
                // The rings keep the rows until the next time, and count those that they lose.
            }
            spacing_ns = std::min(2 * spacing_ns, period_ns);
            due_ns += spacing_ns;
            // After a hung disk or a stopped process, the missed writes are not made up for.
            due_ns = std::max(due_ns, now_ns());
            cpu_ns = read_clock_ns(CLOCK_THREAD_CPUTIME_ID);
        }
    }
};

Journal::Journal(std::int64_t period_ns, std::shared_ptr<Notifier> notifier)
    : state_(std::make_shared<State>(period_ns, std::move(notifier))), owner_pid_(::getpid()) {
    state_->thread = std::thread([state = state_.get()] { state->work(); });
}

Journal::~Journal() {
    stop();
    // A forked child has our memory, but not the thread that may be using it.
    if (owner_pid_ != ::getpid()) new std::shared_ptr<State>(state_);
}

void Journal::add(std::shared_ptr<const Lane> lane, std::shared_ptr<LaneFile> file) {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->entries.push_back({std::move(lane), std::move(file)});
    state_->change(state_->begins);
}

void Journal::flush() { state_->flush(); }

void Journal::stop() {
    if (owner_pid_ != ::getpid() || !state_->thread.joinable()) return;
    state_->change(state_->stopping);
    state_->thread.join();
}

std::int64_t Journal::cpu_ns() const noexcept { return state_->cpu_ns; }

}  // namespace pepr
