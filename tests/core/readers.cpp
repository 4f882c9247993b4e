// The threads that read lanes: who leads, who takes over, which wake-ups are spared.

#include "core_test.h"
#include "sampling/readers.h"

namespace {

bool is_one_reader(int a, int b) {
    return FakeSensor::states[a].reader.load() == FakeSensor::states[b].reader.load();
}

// How often the sampling threads of this process went to sleep.
std::uint64_t sleeps_of_samplers() {
    std::uint64_t sum = 0;
    for (const auto& task : fs::directory_iterator("/proc/self/task")) {
        std::string line, name;
        std::getline(std::ifstream(task.path() / "comm"), name);
        std::ifstream status(task.path() / "status");
        const std::string label = "voluntary_ctxt_switches:";
        while (name == "pepr-sampler" && std::getline(status, line))
            if (line.rfind(label, 0) == 0) sum += std::stoull(line.substr(label.size()));
    }
    return sum;
}

std::int64_t longest_gap_ns(const Recorded& rows) {
    std::int64_t longest_ns = 0;
    for (std::size_t i = 1; i < rows.t_ns.size(); ++i)
        longest_ns = std::max(longest_ns, rows.t_ns[i] - rows.t_ns[i - 1]);
    return longest_ns;
}

TEST(readers_read_quick_lanes_by_one_thread_and_slow_ones_by_another) {
    const auto readers = std::make_shared<pepr::Readers>();
    Sampler quick(FakeSensor::options(0, 4 * kMs), readers);
    CHECK(quick.wait_ready(10 * kNsPerS));
    std::this_thread::sleep_for(
        std::chrono::microseconds(1500));  // started apart, they coincide later
    Sampler other(FakeSensor::options(1, 4 * kMs), readers);
    CHECK(other.wait_ready(10 * kNsPerS));
    CHECK(comes_true([] { return is_one_reader(0, 1); }));
    // due together, they are read in one wake-up: the threads sleep once for two reads
    CHECK(comes_true([] {
        const std::uint64_t slept = sleeps_of_samplers(), read = FakeSensor::states[0].reads;
        std::this_thread::sleep_for(std::chrono::milliseconds(200));
        const std::uint64_t reads = FakeSensor::states[0].reads - read;
        return is_one_reader(0, 1) && reads > 30 &&
               2 * (sleeps_of_samplers() - slept) < 3 * reads;  // apart they would sleep for each
    }));
    FakeSensor::states[1].takes_ns = 8 * kMs;
    CHECK(comes_true([] { return !is_one_reader(0, 1); }));
    const std::uint64_t before = FakeSensor::states[1].reads;
    CHECK(comes_true([&] { return FakeSensor::states[1].reads > before + 30; }));
    CHECK(!is_one_reader(0, 1));
    FakeSensor::states[1].takes_ns = 0;
    CHECK(comes_true([] { return is_one_reader(0, 1); }));
    CHECK(quick.stop(10 * kNsPerS) && other.stop(10 * kNsPerS));
    for (Sampler* sampler : {&quick, &other}) {
        const Recorded rows = read_all(*sampler);
        const std::uint64_t lost = sampler->stats().lost;  // if all this took 1,024 reads or more
        CHECK(rows.t_ns.size() + lost == sampler->stats().samples);
        for (std::size_t i = 0; i < rows.columns[0].size(); ++i)  // none twice, none left out
            CHECK(rows.columns[0][i] == static_cast<double>(lost + i + 1));
        CHECK(sampler->stats().cpu_ns > 0);
    }
}

TEST(readers_go_on_when_a_driver_keeps_its_leader) {
    const std::size_t threads_before = thread_count();
    {
        const auto readers = std::make_shared<pepr::Readers>();
        Sampler hung(FakeSensor::options(0, 2 * kMs), readers),
            other(FakeSensor::options(1, 2 * kMs), readers);
        Sampler third(FakeSensor::options(2, 5 * kMs), readers);
        for (int round = 0; round < 3; ++round) {
            // given all in one hand, which is kept
            CHECK(comes_true([] { return is_one_reader(0, 1) && is_one_reader(1, 2); }));
            FakeSensor::states[0].hangs = true;
            CHECK(comes_true([] { return !is_one_reader(0, 1) && is_one_reader(1, 2); }));
            const std::uint64_t reads = FakeSensor::states[0].reads;
            const std::uint64_t before = FakeSensor::states[1].reads;
            CHECK(comes_true([&] { return FakeSensor::states[1].reads > before + 100; }));
            CHECK(FakeSensor::states[0].reads == reads);
            if (round < 2) FakeSensor::states[0].hangs = false;
        }
        CHECK(other.stop(10 * kNsPerS));
        const std::int64_t begin_ns = now_ns();
        CHECK(!hung.stop(50 * kMs));
        CHECK(now_ns() - begin_ns < 2 * kNsPerS);
        CHECK(third.stop(10 * kNsPerS));
        CHECK(longest_gap_ns(read_all(other)) < 5 * kNsPerS);  // 0.35 s where CPUs are free
        CHECK(thread_count_becomes(threads_before + 1));
    }
    FakeSensor::states[0].hangs = false;
    CHECK(thread_count_becomes(threads_before));
}

TEST(readers_stop_a_lane_while_another_keeps_its_leader) {
    const std::size_t threads_before = thread_count();
    {
        const auto readers = std::make_shared<pepr::Readers>();
        Sampler hung(FakeSensor::options(0, kMs), readers),
            other(FakeSensor::options(1, kMs), readers);
        CHECK(comes_true([] { return is_one_reader(0, 1) && FakeSensor::states[1].reads > 20; }));
        FakeSensor::states[0].hangs = true;
        CHECK(other.stop(10 * kNsPerS));  // at once: nobody has noticed yet
        CHECK(!hung.stop(20 * kMs));
        CHECK(hung.stop(0));  // it was left behind
    }
    FakeSensor::states[0].hangs = false;
    CHECK(thread_count_becomes(threads_before));
}

TEST(readers_cycles_leave_nothing_behind) {
    const std::size_t threads = thread_count();
    for (int cycle = 0; cycle < 60; ++cycle) {
        const auto readers = std::make_shared<pepr::Readers>();
        std::vector<std::unique_ptr<Sampler>> lanes;
        for (int i = 0; i < FakeSensor::kCount; ++i)
            lanes.push_back(
                std::make_unique<Sampler>(FakeSensor::options(i, (i % 2 + 1) * kMs), readers));
        if (cycle % 3 > 0) std::this_thread::sleep_for(std::chrono::milliseconds(cycle));
        std::rotate(lanes.begin(), lanes.begin() + cycle % FakeSensor::kCount, lanes.end());
        for (const auto& lane : lanes)
            if (cycle % 2 == 0) CHECK(lane->stop(10 * kNsPerS));
    }
    CHECK(thread_count_becomes(threads));
}

TEST(readers_read_without_an_allocation) {
    const auto readers = std::make_shared<pepr::Readers>();
    Sampler a(FakeSensor::options(0, kMs), readers), b(FakeSensor::options(1, kMs), readers);
    CHECK(comes_true([] { return is_one_reader(0, 1) && FakeSensor::states[1].reads > 50; }));
    std::uint64_t allocations_before = 0, reads_before = 0;
    CHECK(comes_true([&] {  // a stretch in which it stays one thread: a busy machine has few
        if (!is_one_reader(0, 1)) return false;
        const std::thread::id reader = FakeSensor::states[0].reader.load();
        allocations_before = FakeSensor::states[0].allocations;
        reads_before = FakeSensor::states[0].reads;
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        return FakeSensor::states[0].reader.load() == reader &&
               FakeSensor::states[0].reads > reads_before &&
               FakeSensor::states[0].allocations == allocations_before;
    }));
}

// Lanes whose period nobody asked for share the wake-ups of lanes that must be read.
TEST(readers_spare_the_wake_ups_of_flexible_lanes) {
    const auto readers = std::make_shared<pepr::Readers>();
    const auto budget = std::make_shared<pepr::CpuBudget>(0.9);
    pepr::Lane::Options elastic = FakeSensor::options(1, 20 * kMs);
    elastic.budget = budget;
    Sampler rigid(FakeSensor::options(0, 16 * kMs), readers), other(std::move(elastic), readers);
    CHECK(comes_true([] { return is_one_reader(0, 1) && FakeSensor::states[1].reads > 20; }));
    const std::int64_t from_ns = now_ns();
    CHECK(comes_true([reads = FakeSensor::states[1].reads.load()] {
        return FakeSensor::states[1].reads > reads + 50;
    }));
    CHECK(rigid.stop(10 * kNsPerS) && other.stop(10 * kNsPerS));
    const Recorded its = read_all(rigid), theirs = read_all(other);
    std::size_t along = 0, all = 0;
    for (std::size_t i = 0; i + 1 < theirs.t_ns.size(); ++i) {
        if (theirs.t_ns[i] < from_ns) continue;
        ++all;
        const auto at = std::lower_bound(its.t_ns.begin(), its.t_ns.end(), theirs.t_ns[i]);
        const bool before = at != its.t_ns.begin() && theirs.t_ns[i] - *(at - 1) < 2 * kMs;
        along += before || (at != its.t_ns.end() && *at - theirs.t_ns[i] < 2 * kMs);
    }
    CHECK(all >= 50 && along * 10 >= all * 7);  // by chance it would be 1 in 4
}

// The slack is a whole spacing: whatever the phase is, a wake-up of another lane fits.
TEST(flexible_lane_has_slack_whatever_its_period) {
    for (const std::int64_t period_ns : {20 * kMs, 100 * kMs, kNsPerS, 10 * kNsPerS}) {
        pepr::Lane::Options how = FakeSensor::options(0, period_ns);
        how.budget = std::make_shared<pepr::CpuBudget>(0.9);
        pepr::Lane lane(std::move(how), now_ns());
        CHECK(lane.open());
        pepr::CpuLaps laps;
        lane.read(false, laps);
        CHECK(lane.earliest_ns() < lane.due_ns() && lane.due_ns() < lane.latest_ns());
        CHECK(lane.latest_ns() - lane.earliest_ns() == period_ns);
    }
}

// Sharing wake-ups is no reason to be read more often.
TEST(readers_read_flexible_lanes_no_more_often_than_due) {
    const auto readers = std::make_shared<pepr::Readers>();
    pepr::Lane::Options elastic = FakeSensor::options(1, 40 * kMs);
    elastic.budget = std::make_shared<pepr::CpuBudget>(0.9);
    Sampler rigid(FakeSensor::options(0, 10 * kMs), readers), other(std::move(elastic), readers);
    CHECK(comes_true([] { return is_one_reader(0, 1) && FakeSensor::states[1].reads > 20; }));
    CHECK(comes_true([reads = FakeSensor::states[1].reads.load()] {
        return FakeSensor::states[1].reads > reads + 20;
    }));
    CHECK(rigid.stop(10 * kNsPerS) && other.stop(10 * kNsPerS));
    const Recorded rows = read_all(other);
    std::int64_t early = 0;
    for (std::size_t i = 1; i + 1 < rows.t_ns.size(); ++i)
        early += rows.t_ns[i] - rows.t_ns[i - 1] < 35 * kMs;
    CHECK(early * 5 <= static_cast<std::int64_t>(rows.t_ns.size()));  // 0 on a quiet machine
}

}  // namespace
