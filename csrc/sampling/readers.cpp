#include "sampling/readers.h"

#include <algorithm>
#include <mutex>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sys/prctl.h>

#include "system/futex.h"

namespace pepr {

namespace {

constexpr std::int64_t kMs = 1'000'000, kForever = INT64_MAX;

// A read is quick if it takes up to a 16th of the spacing of any other lane; below 20 µs it always
// is, above 1 ms never. The leader reads a lane that was quick 16 times in a row (4 times and 2 s,
// if it is read seldom). So a lane that is slow now and then delays the others little, and seldom.
constexpr std::int64_t kQuickShare = 16, kAlwaysQuickNs = 20'000, kNeverQuickNs = kMs;
constexpr int kQuickReads = 16;

// A leader hangs if one read takes it so long. While it does not sleep, it is checked so often.
constexpr std::int64_t kHungNs = 100 * kMs, kCheckNs = 250 * kMs;

using LanePtr = std::shared_ptr<Lane>;
using Lock = std::unique_lock<std::mutex>;

void remove(std::vector<LanePtr>& lanes, const LanePtr& lane) {
    lanes.erase(std::remove(lanes.begin(), lanes.end(), lane), lanes.end());
}

}  // namespace

struct Readers::State {
    struct Member {
        LanePtr lane;
        std::thread::id reader{};  // the thread that reads it, or did last
        int quick_reads = 0;       // in a row; those of a lane that is read seldom count for more
        bool stopping = false;
    };

    const std::int64_t epoch_ns = now_ns();
    std::mutex mutex;                          // protects all that follows, except `changes`
    std::vector<Member> members;               // the lanes that have not ended
    std::vector<LanePtr> shared;               // those of them that the leader reads
    std::vector<std::thread> threads;          // as many as members, except for a moment
    std::vector<std::thread> exited;           // to be joined
    std::uint64_t terms = 0, leader_term = 0;  // of leaders so far; of the present one, 0: none
    bool has_watcher = false;                  // a thread checks that the leader does not hang
    LanePtr reading;                           // what the leader reads
    std::int64_t reading_since_ns = 0, wakes_at_ns = 0;
    std::atomic<std::uint32_t> changes{0};  // all threads sleep on this

    void announce_change() noexcept {
        changes.fetch_add(1, std::memory_order_release);
        wake_all(changes);
    }

    void wait(Lock& lock, std::int64_t deadline_ns) noexcept {
        const std::uint32_t seen = changes.load(std::memory_order_acquire);
        lock.unlock();
        wait_while(changes, seen, deadline_ns);
        lock.lock();
    }

    Member* find(const LanePtr& lane) noexcept {
        const auto at = std::find_if(members.begin(), members.end(),
                                     [&](const Member& member) { return member.lane == lane; });
        return at != members.end() ? &*at : nullptr;
    }

    void remove_member(const LanePtr& lane) noexcept {
        remove(shared, lane);
        if (const Member* const member = find(lane))
            members.erase(members.begin() + (member - members.data()));
        announce_change();
    }

    // --- the life of a thread ---

    void run(LanePtr lane) noexcept {
        ::pthread_setname_np(::pthread_self(), "pepr-sampler");
        // The default slack of 50 µs would make every wake-up that late (median 62 µs against 12).
        ::prctl(PR_SET_TIMERSLACK, 1);
        CpuLaps laps;
        const bool opened = lane->open();
        Lock lock(mutex);
        if (!opened && find(lane) != nullptr) {
            remove_member(lane);
            lane = nullptr;
        }
        for (;;) {
            if (lane != nullptr && find(lane) == nullptr) return;  // abandoned meanwhile
            if (lane != nullptr) {
                lane = read_alone(lock, std::move(lane), laps);
            } else if (threads.size() > members.size()) {
                exited.push_back(take_thread(std::this_thread::get_id()));
                return announce_change();
            } else if (leader_term == 0 && !shared.empty()) {
                lane = lead(lock, laps);
            } else {
                stand_by(lock, laps);
            }
        }
    }

    std::thread take_thread(std::thread::id id) noexcept {
        const auto at = std::find_if(threads.begin(), threads.end(),
                                     [id](const std::thread& t) { return t.get_id() == id; });
        std::thread taken = std::move(*at);
        threads.erase(at);
        return taken;
    }

    // Reads one lane once, when it is due. Returns it if this thread is to go on reading it.
    LanePtr read_alone(Lock& lock, LanePtr lane, CpuLaps& laps) noexcept {
        const bool last = find(lane)->stopping, alone = members.size() == 1;
        if (!last && now_ns() < lane->due_ns()) {
            const std::uint32_t seen = changes.load(std::memory_order_acquire);
            lock.unlock();
            // The only lane needs no lock until something changes: that saves a tenth of CPU time.
            while (!wait_while(changes, seen, lane->due_ns()) && alone) lane->read(false, laps);
            lock.lock();
            return lane;
        }
        if (!read(lock, lane, last, laps)) return lane;
        if (last) {
            remove_member(lane);
        } else if (alone || find(lane)->quick_reads < kQuickReads) {
            return lane;
        } else {
            lane->charge(laps);
            shared.push_back(lane);
            announce_change();
        }
        return nullptr;
    }

    // Reads a lane, without the lock. False if it was abandoned meanwhile.
    bool read(Lock& lock, const LanePtr& lane, bool last, CpuLaps& laps) noexcept {
        find(lane)->reader = std::this_thread::get_id();
        lock.unlock();
        lane->read(last, laps);
        lock.lock();
        Member* const member = find(lane);
        if (member == nullptr) return false;
        const std::int64_t eighths = lane->spacing_ns() * 8 / kNsPerS;
        const int credit = static_cast<int>(std::clamp<std::int64_t>(eighths, 1, kQuickReads / 4));
        member->quick_reads = lane->took_ns() <= quick_ns(lane) ? member->quick_reads + credit : 0;
        return true;
    }

    std::int64_t quick_ns(const LanePtr& lane) const noexcept {
        std::int64_t most_ns = kNeverQuickNs;
        for (const Member& other : members)
            if (other.lane != lane)
                most_ns = std::min(most_ns, other.lane->spacing_ns() / kQuickShare);
        return std::max(most_ns, kAlwaysQuickNs);
    }

    // Reads the shared lanes, until there are none or one was slow: returns that one.
    LanePtr lead(Lock& lock, CpuLaps& laps) noexcept {
        const std::uint64_t term = leader_term = ++terms;
        announce_change();  // so that a thread watches us
        while (!shared.empty()) {
            wakes_at_ns = next_wake_ns();
            if (now_ns() < wakes_at_ns) wait(lock, wakes_at_ns);
            if (leader_term != term) return nullptr;
            std::int64_t t_ns = now_ns();
            if (t_ns < next_wake_ns()) continue;
            // Lanes without slack first: their next deadlines decide which others may be read now.
            for (const bool with_slack : {false, true})
                for (std::size_t i = 0; i < shared.size(); ++i) {
                    const LanePtr lane = shared[i];
                    const bool last = find(lane)->stopping;
                    if (!last && (lane->has_slack() != with_slack || !may_read(*lane, t_ns)))
                        continue;
                    reading = lane;
                    reading_since_ns = t_ns;
                    const bool known = read(lock, lane, last, laps);
                    lane->charge(laps);
                    if (leader_term != term || !known) return lane;
                    if (last) {
                        remove_member(lane);
                        --i;
                    } else if (find(lane)->quick_reads == 0) {
                        replace_leader();
                        return lane;
                    }
                    reading = nullptr;
                    t_ns = now_ns();
                }
        }
        leader_term = 0;
        return nullptr;
    }

    // Whether to read a lane now: once it is due, or earlier if no later wake-up is in time for it.
    bool may_read(const Lane& lane, std::int64_t t_ns) const noexcept {
        const bool in_time = next_fixed_ns() <= lane.latest_ns();
        return t_ns >= (in_time ? lane.due_ns() : lane.earliest_ns());
    }

    std::int64_t next_fixed_ns() const noexcept {
        std::int64_t fixed_ns = kForever;
        for (const LanePtr& lane : shared)
            if (!lane->has_slack()) fixed_ns = std::min(fixed_ns, lane->due_ns());
        return fixed_ns;
    }

    std::int64_t next_wake_ns() noexcept {
        const std::int64_t fixed_ns = next_fixed_ns();
        std::int64_t wake_ns = fixed_ns;
        for (const LanePtr& lane : shared) {
            if (find(lane)->stopping) return 0;
            if (fixed_ns > lane->latest_ns()) wake_ns = std::min(wake_ns, lane->due_ns());
        }
        return wake_ns;
    }

    // Sleeps. One of the sleeping threads wakes up now and then to check the leader.
    void stand_by(Lock& lock, CpuLaps& laps) noexcept {
        if (has_watcher || leader_term == 0 || shared.size() < 2) return wait(lock, kForever);
        has_watcher = true;
        wait(lock, std::max(now_ns() + kCheckNs, wakes_at_ns + 5 * kHungNs / 4));
        has_watcher = false;
        if (!shared.empty()) shared.front()->charge(laps);
        replace_hung_leader();
    }

    void replace_hung_leader() noexcept {
        if (reading != nullptr && now_ns() - reading_since_ns > kHungNs) replace_leader();
    }

    // The old leader keeps the lane that it is reading.
    void replace_leader() noexcept {
        remove(shared, reading);
        reading = nullptr;
        leader_term = 0;
        announce_change();
    }

    // --- from outside ---

    // Leaves the lane to the thread that hangs in its driver.
    void abandon(const LanePtr& lane) noexcept {
        const bool is_read =
            reading == lane || std::find(shared.begin(), shared.end(), lane) == shared.end();
        const std::thread::id reader = find(lane)->reader;
        if (reading == lane) replace_leader();
        remove_member(lane);
        if (is_read) take_thread(reader).detach();
    }
};

Readers::Readers() : state_(std::make_shared<State>()) {}

std::shared_ptr<Lane> Readers::add(Lane::Options options) {
    State& state = *state_;
    const auto lane = std::make_shared<Lane>(std::move(options), state.epoch_ns);
    const Lock lock(state.mutex);
    state.members.reserve(state.members.size() + 1);
    state.shared.reserve(state.members.size() + 1);  // so that reading does not allocate
    state.threads.emplace_back([state = state_, lane] { state->run(lane); });
    state.members.push_back({lane, state.threads.back().get_id()});
    return lane;
}

bool Readers::stop(const std::shared_ptr<Lane>& lane, std::int64_t timeout_ns) {
    State& state = *state_;
    const std::int64_t deadline_ns = now_ns() + timeout_ns;
    std::vector<std::thread> exited;
    bool in_time = true;
    {
        Lock lock(state.mutex);
        if (State::Member* const member = state.find(lane)) member->stopping = true;
        state.announce_change();
        while (in_time && state.find(lane) != nullptr) {
            state.wait(lock, std::min(deadline_ns, now_ns() + kHungNs / 2));
            state.replace_hung_leader();
            in_time = now_ns() < deadline_ns || state.find(lane) == nullptr;
        }
        if (!in_time) state.abandon(lane);
        // One thread is too many now. It exits when it wakes up or comes from a read.
        const std::int64_t give_up_ns = now_ns() + kNsPerS;
        while (state.threads.size() > state.members.size() && now_ns() < give_up_ns)
            state.wait(lock, give_up_ns);
        exited.swap(state.exited);
    }
    for (std::thread& thread : exited) thread.join();
    return in_time;
}

void Readers::leak() const { new std::shared_ptr<State>(state_); }

}  // namespace pepr
