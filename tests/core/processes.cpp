// CPU time of process trees and of the machine.

#include <cstdio>
#include <random>

#include <sys/resource.h>

#include "core_test.h"
#include "sensors/cpu_time_reconciler.h"
#include "sensors/machine_time.h"

namespace {

std::int64_t burn(clockid_t clock, std::int64_t cpu_ns) {
    const std::int64_t begin_ns = pepr::read_clock_ns(clock);
    std::int64_t used_ns = 0;
    while (used_ns < cpu_ns) used_ns = pepr::read_clock_ns(clock) - begin_ns;
    return used_ns;
}

double poll_cpu_s(pepr::Sensor& sensor) {
    std::vector<double> row(sensor.channels().size());
    sensor.poll(row.data());
    return row[0];
}

double seconds(const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
}

// Runs `work` in a forked child and waits for it; returns the CPU time that the kernel charged it.
double run_child_s(const std::function<void()>& work) {
    const pid_t child = ::fork();
    if (child == 0) {
        work();
        ::_exit(0);
    }
    rusage usage{};
    int status = -1;
    CHECK(::wait4(child, &status, 0, &usage) == child && status == 0);
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// What a hypervisor steals from a running thread is in perf's count until /proc/stat shows it, in
// ticks of 10 ms for each of two threads.
constexpr double kStolenS = 0.02;

TEST(processes_self_counts_threads) {
    const auto sensor = pepr::open_sensor("processes:self");
    CHECK(sensor->channels().at(0).name == "job/cpu");
    std::atomic<std::int64_t> burnt_ns{0};
    const std::int64_t clock_before_ns = pepr::read_clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    const double before_s = poll_cpu_s(*sensor);
    std::vector<std::thread> threads;
    for (int i = 0; i < 2; ++i)
        threads.emplace_back([&] { burnt_ns += burn(CLOCK_THREAD_CPUTIME_ID, 150 * kMs); });
    for (std::thread& thread : threads) thread.join();
    const double counted_s = poll_cpu_s(*sensor) - before_s;
    const std::int64_t clock_ns = pepr::read_clock_ns(CLOCK_PROCESS_CPUTIME_ID) - clock_before_ns;
    CHECK(counted_s >= 1e-9 * static_cast<double>(burnt_ns.load()));
    CHECK(counted_s <= 1e-9 * static_cast<double>(clock_ns) + kStolenS);
}

TEST(processes_count_children_that_were_waited_for) {
    const auto self = pepr::open_sensor("processes:self");
    const auto children = pepr::open_sensor("processes:children");
    const double self_before_s = poll_cpu_s(*self), children_before_s = poll_cpu_s(*children);
    const double charged_s = run_child_s([] { burn(CLOCK_PROCESS_CPUTIME_ID, 250 * kMs); });
    CHECK(charged_s >= 0.24);
    CHECK(std::abs(poll_cpu_s(*children) - children_before_s - charged_s) < kStolenS);
    // Our own time, of waiting only, comes on top.
    CHECK(poll_cpu_s(*self) - self_before_s >= charged_s - 0.001);
    CHECK(poll_cpu_s(*self) - self_before_s < charged_s + 0.05);
}

TEST(processes_children_leave_out_ourselves) {
    const auto children = pepr::open_sensor("processes:children");
    const double before_s = poll_cpu_s(*children);
    burn(CLOCK_PROCESS_CPUTIME_ID, 100 * kMs);
    CHECK(poll_cpu_s(*children) - before_s < kStolenS);  // of 0.1 s: two clocks, and what is stolen
}

TEST(processes_pids_count_from_the_open_on) {
    int clocks[2], go[2];
    CHECK(::pipe(clocks) == 0 && ::pipe(go) == 0);
    const pid_t child = ::fork();
    if (child == 0) {
        const pid_t grandchild = ::fork();
        const auto burn_and_tell = [&] {
            burn(CLOCK_PROCESS_CPUTIME_ID, 100 * kMs);
            const std::int64_t ns = pepr::read_clock_ns(CLOCK_PROCESS_CPUTIME_ID);
            if (::write(clocks[1], &ns, sizeof ns) != sizeof ns) ::_exit(1);
        };
        ::close(go[1]);
        burn_and_tell();
        char byte = 0;
        if (::read(go[0], &byte, 1) != 0) ::_exit(1);
        burn_and_tell();
        int status = 0;
        if (grandchild > 0) ::waitpid(grandchild, &status, 0);
        ::_exit(status);
    }
    const auto sum_of_two = [&] {
        std::int64_t ns[2] = {};
        for (std::int64_t& value : ns)
            CHECK(::read(clocks[0], &value, sizeof value) == sizeof value);
        return 1e-9 * static_cast<double>(ns[0] + ns[1]);
    };
    const double before_s = sum_of_two();
    const auto sensor = pepr::open_sensor("processes:pids=" + std::to_string(child));
    std::vector<double> row(sensor->channels().size());
    sensor->poll(row.data());
    CHECK(row[0] < 0.01 && row[2] == 2.0);
    ::close(go[1]);
    const double used_s = sum_of_two() - before_s;
    int status = -1;
    CHECK(::waitpid(child, &status, 0) == child && status == 0);
    sensor->finish();
    sensor->poll(row.data());
    if (sensor->notes().empty()) CHECK(row[0] > used_s - 0.005);  // perf
    CHECK(row[0] < used_s + 0.1);  // the rest is what it takes to end
    CHECK(row[2] == 0.0);
    for (const int fd : {clocks[0], clocks[1], go[0]}) ::close(fd);
}

// While one child lives, another is born and ends, and then none is left.
TEST(processes_are_read_without_an_allocation) {
    int hold[2];
    CHECK(::pipe(hold) == 0);
    const auto sensor = pepr::open_sensor("processes:self");
    std::vector<double> row(sensor->channels().size());
    const pid_t stays = ::fork();
    if (stays == 0) {
        char byte = 0;
        ::close(hold[1]);
        ::_exit(::read(hold[0], &byte, 1) == 0 ? 0 : 1);
    }
    const std::uint64_t before = allocations;
    for (int i = 0; i < 5; ++i) {
        sensor->poll(row.data());
        if (i > 1) CHECK(row[2] == 2.0);
    }
    const pid_t ends = ::fork();
    if (ends == 0) ::_exit(0);
    sensor->poll(row.data());
    int status = -1;
    CHECK(::waitpid(ends, &status, 0) == ends);
    ::close(hold[1]);
    CHECK(::waitpid(stays, &status, 0) == stays && status == 0);
    sensor->finish();
    sensor->poll(row.data());
    CHECK(allocations == before);
    CHECK(row[2] == 1.0);
    ::close(hold[0]);
}

// A tree on two CPUs in virtual time, with 10 polls a second for 100 s. A hypervisor steals from
// it.
struct Stolen {
    double share;          // of the time that its tasks run
    int changes_each = 0;  // polls
    double unseen_s = 0;   // a poll, or a change, of processes that were never found
    double setuid_s = 0;   // a poll, which the count is blind to
    double noise_s = 0;    // between the reads of the count and of the clocks
    double others_s = 0;   // a poll, stolen of other programs
};

struct Outcome {
    double cpu_s, truth_s, stolen_s;
    int asked = 0;  // how often stolen time was read
};

Outcome simulate(const Stolen& load) {
    constexpr double kTick_s = 0.01, kBefore_s = 11.67;
    std::mt19937 random(5);
    std::uniform_real_distribution<double> noise_s(0, load.noise_s);
    pepr::CpuTimeReconciler reconciler(kBefore_s, kTick_s);
    Outcome result{0, 0, 0};
    double count_s = 0, clocks_s = 0, unseen_s = 0;
    for (int poll = 0; poll < 1000; ++poll) {
        const bool changed = load.changes_each > 0 && poll % load.changes_each == 0;
        const double ran_s = poll > 0 ? 0.2 : 0.0;
        if (changed || load.changes_each == 0) unseen_s += load.unseen_s;
        result.stolen_s += load.share * ran_s + load.others_s;
        clocks_s += (1 - load.share) * ran_s + load.setuid_s;
        count_s += ran_s;
        result.truth_s = clocks_s + unseen_s;
        const auto stolen_s = [&] {
            ++result.asked;
            return kBefore_s + kTick_s * std::floor(result.stolen_s / kTick_s);
        };
        result.cpu_s = reconciler.update(count_s + unseen_s + noise_s(random), clocks_s,
                                         poll == 0 || changed, stolen_s);
    }
    return result;
}

TEST(cpu_time_is_without_what_was_stolen) {
    for (const double share : {0.001, 0.015, 0.3}) {
        const Outcome idle = simulate({share});
        CHECK(std::abs(idle.cpu_s - idle.truth_s) < 0.021);  // one tick, and one not shown yet
        CHECK(idle.asked <= 1000 * std::min(1.0, share * 0.2 / 0.01));
        // given births or deaths, stolen time since the last poll cannot be distinguished from
        // theirs
        const Outcome busy = simulate({share, 10});
        CHECK(busy.cpu_s - busy.truth_s > -0.001);
        CHECK(busy.cpu_s - busy.truth_s < 0.11 * busy.stolen_s + 0.021);
    }
}

TEST(cpu_time_that_was_not_stolen_is_kept) {
    const Outcome unseen = simulate({0, 0, 0.005});
    CHECK(std::abs(unseen.cpu_s - unseen.truth_s) < 1e-9);
    const Outcome setuid = simulate({0, 0, 0, 0.01});
    CHECK(std::abs(setuid.cpu_s - setuid.truth_s) < 1e-9 && setuid.asked == 0);
    // at most what was stolen is subtracted
    const Outcome both = simulate({0.01, 0, 0.005});
    CHECK(both.truth_s - both.cpu_s < 1e-9 && both.cpu_s - both.truth_s < both.stolen_s);
    // and nothing for processes that began and ended unseen, whatever was stolen from other
    // programs
    const Outcome born = simulate({0, 10, 0.05, 0, 0, 0.02});
    CHECK(std::abs(born.cpu_s - born.truth_s) < 1e-9);
    const Outcome still = simulate({0, 0, 0, 0, 0.002});
    CHECK(std::abs(still.cpu_s - still.truth_s) < 0.0021 && still.asked == 0);
}

// The time of a machine, from our files in place of the kernel's.
TEST(machine_time_is_of_the_whole_machine) {
    const Folder folder;
    const fs::path root = fs::path(folder.write("here", "")).parent_path();
    const auto write = [&](const std::string& name, const std::string& text) {
        fs::create_directories((root / name).parent_path());
        std::ofstream(root / name) << text;
    };
    const auto close = [](double value, double expected) {
        return std::abs(value - expected) < 1e-6;
    };
    CHECK(!pepr::MachineTime(root.string()));
    write("proc/stat", "cpu  1000 200 300 9999 77 1 4 50 600 60\ncpu0 1 2 3 4 5 6 7 8 9 10\n");
    {
        pepr::MachineTime machine(root.string());
        CHECK(machine && close(machine.busy_s(), 15.05) && close(machine.stolen_s(), 0.5));
        write("proc/stat", "cpu  1100 200 300 9999 77 1 4 60 600 60\n");
        CHECK(close(machine.busy_s(), 16.05) && close(machine.stolen_s(), 0.6));
    }
    const std::string stat =
        "usage_usec 16999999\nuser_usec 13001234\nsystem_usec 3050000\nnice_usec 2000000\n";
    for (const char* place : {"sys/fs/cgroup/unified/", "sys/fs/cgroup/"}) {
        write(std::string(place) + "cpu.stat", stat);
        pepr::MachineTime machine(root.string());
        CHECK(close(machine.busy_s(), 16.051234) && close(machine.stolen_s(), 0.6));
        write(std::string(place) + "cgroup.type", "domain\n");  // a container's own
        CHECK(close(pepr::MachineTime(root.string()).busy_s(), 16.05));
    }
    fs::remove(root / "sys/fs/cgroup/cgroup.type");
    write("sys/fs/cgroup/cpu.stat", "nr_periods 0\nnr_throttled 0\n");
    CHECK(close(pepr::MachineTime(root.string()).busy_s(), 16.05));
    write("proc/stat", "cpu  1100 200\n");
    pepr::MachineTime torn(root.string());
    CHECK(std::isnan(torn.busy_s()) && std::isnan(torn.stolen_s()));
}

// --- a cgroup ------------------------------------------------------------------------------------

// A folder that looks like a cgroup, or a real one.
class Group {
public:
    explicit Group(fs::path path) : path_(std::move(path)) { fs::create_directory(path_); }
    ~Group() { remove(); }
    void write(const char* name, const std::string& text) const {
        std::ofstream(path_ / name) << text;
    }
    void use(double cpu_s) const {
        write("cpu.stat", "usage_usec " + std::to_string(std::llround(1e6 * cpu_s)) +
                              "\nuser_usec 1\nsystem_usec 2\n");
    }
    void remove() const {
        if (std::error_code error; !fs::remove(path_, error)) fs::remove_all(path_, error);
    }
    std::string spec() const { return "processes:cgroup=" + path_.string(); }
    const fs::path& path() const { return path_; }

private:
    fs::path path_;
};

std::vector<double> polled(pepr::Sensor& sensor) {
    std::vector<double> row(sensor.channels().size());
    sensor.poll(row.data());
    return row;
}

bool equal(double value, double expected) { return std::abs(value - expected) < 1e-6; }

TEST(processes_of_a_cgroup_are_what_the_kernel_says) {
    int hold[2];
    CHECK(::pipe(hold) == 0);
    const pid_t child = ::fork();
    if (child == 0) {
        char byte = 0;
        ::close(hold[1]);
        ::_exit(::read(hold[0], &byte, 1) == 0 ? 0 : 1);
    }
    const Folder folder;
    const fs::path root = fs::path(folder.write("here", "")).parent_path();
    const Group group(root / "a"), below(root / "a" / "b");
    group.use(100);
    group.write("cgroup.procs", "");
    group.write("memory.current", "5000\n");
    below.use(7);
    const auto sensor = pepr::open_sensor(group.spec());
    CHECK(sensor->channels().size() == 5 && sensor->channels()[4].name == "job/memory-current");
    std::vector<double> row = polled(*sensor);
    CHECK(row[0] == 0.0 && row[1] == 0.0 && row[2] == 0.0 && row[4] == 5000.0);
    // The profiler is not of the job, nor is a process that has gone; one of another namespace is.
    below.write("cgroup.procs", std::to_string(child) + "\n" + std::to_string(::getpid()) + "\n" +
                                    std::to_string(1 << 22) + "\n0\n");
    group.use(100.25);
    std::uint64_t before = allocations;
    sensor->poll(row.data());
    CHECK(allocations == before);
    CHECK(equal(row[0], 0.25) && row[1] > 10'000 && row[2] == 2.0);
    ::close(hold[1]);
    int status = -1;
    CHECK(::waitpid(child, &status, 0) == child && status == 0);
    below.write("cgroup.procs", "");
    CHECK(polled(*sensor)[2] == 0.0);
    // It goes, with what it used unseen in the group above it, and another one comes.
    const auto above = [&](double cpu_s) {
        folder.write("cpu.stat", "usage_usec " + std::to_string(std::llround(1e6 * cpu_s)) + "\n");
    };
    above(500);
    CHECK(
        explains_itself([&] { pepr::open_sensor("processes:cgroup=" + root.string() + "/here"); }));
    const auto again = pepr::open_sensor(group.spec());
    polled(*again);
    above(500.75);  // others: 0.5 s
    group.use(100.5);
    CHECK(equal(polled(*again)[0], 0.25));
    std::ofstream(group.path() / "cpu.stat").close();  // as a read of a removed group: nothing
    above(501.5);
    before = allocations;
    again->poll(row.data());
    CHECK(allocations == before);
    CHECK(equal(row[0], 0.5) && row[1] == 0.0 && row[2] == 0.0);
    group.remove();
    CHECK(equal(polled(*again)[0], 0.5) && polled(*again)[4] == 0.0);
    const Group next(group.path());
    next.use(0.125);
    CHECK(equal(polled(*again)[0], 0.625));
}

// A process that is no descendant of the tree's, and its own child: both bear the mark.
TEST(processes_that_bear_the_mark_count_wherever_they_hang) {
    int hold[2], said[2];
    CHECK(::pipe(hold) == 0 && ::pipe(said) == 0);
    const pid_t root = ::fork();
    if (root == 0) {
        char byte = 0;
        ::close(hold[1]);
        ::_exit(::read(hold[0], &byte, 1) == 0 ? 0 : 1);
    }
    const auto sensor =
        pepr::open_sensor("processes:pids=" + std::to_string(root) + ",mark=PEPR_X=1-2");
    std::vector<double> row = polled(*sensor);
    CHECK(row[2] == 1.0);
    const auto start = [&](const char* mark) {
        const pid_t child = ::fork();
        if (child != 0) return child;
        ::close(hold[1]);
        ::dup2(hold[0], 0);
        ::dup2(said[1], 1);
        const char* const script =
            "(i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done); echo; read x";
        const char* const words[] = {"sh", "-c", script, nullptr};
        const char* const variables[] = {"A=b", mark, nullptr};
        ::execve("/bin/sh", const_cast<char* const*>(words), const_cast<char* const*>(variables));
        ::_exit(127);
    };
    const pid_t ours = start("PEPR_X=1-2"), others = start("PEPR_X=1-23");
    char bytes[2] = {};
    for (char& byte : bytes) CHECK(::read(said[0], &byte, 1) == 1);
    const std::uint64_t before = allocations;
    for (int i = 0; i < 3; ++i) sensor->poll(row.data());
    CHECK(allocations == before);
    const double cpu_s = row[0];
    CHECK(row[2] == 2.0);  // the root, and ours
    ::close(hold[1]);
    rusage usage{};
    int status = -1;
    CHECK(::wait4(ours, &status, 0, &usage) == ours);
    const double charged_s = seconds(usage.ru_utime) + seconds(usage.ru_stime);
    CHECK(charged_s > 0.01 && std::abs(cpu_s - charged_s) < 0.02);  // ticks: a child was waited for
    CHECK(::waitpid(others, &status, 0) == others && ::waitpid(root, &status, 0) == root);
    sensor->finish();
    sensor->poll(row.data());
    CHECK(row[0] >= cpu_s && row[2] == 0.0);
    for (const int fd : {hold[0], said[0], said[1]}) ::close(fd);
}

TEST(processes_of_a_cgroup_of_version_1_are_refused) {
    const Folder folder;
    const fs::path root = fs::path(folder.write("here", "")).parent_path();
    const Group group(root / "a");
    CHECK(explains_itself([&] { pepr::open_sensor(group.spec()); }));
    group.write("cpu.stat", "nr_periods 0\nnr_throttled 0\n");
    CHECK(explains_itself([&] { pepr::open_sensor(group.spec()); }));
    CHECK(explains_itself([] { pepr::open_sensor("processes:cgroup=a"); }));
}

// A group that is made later, in which a process comes and goes.
TEST(processes_of_a_real_cgroup_count_whoever_waits_for_them) {
    const std::string name = "/pepr-core-test-" + std::to_string(::getpid());
    for (const char* mount : {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}) {
        const fs::path path = mount + name;
        const auto sensor = pepr::open_sensor("processes:cgroup=" + path.string());
        if (::mkdir(path.c_str(), 0755) != 0) continue;
        const Group group(path);
        if (!fs::exists(path / "cgroup.procs")) continue;  // a tmpfs above cgroups of version 1
        CHECK(polled(*sensor)[0] == 0.0);
        const double charged_s = run_child_s([&] {
            group.write("cgroup.procs", "0");
            burn(CLOCK_PROCESS_CPUTIME_ID, 250 * kMs);
        });
        const std::vector<double> row = polled(*sensor);
        CHECK(row[0] > 0.245 && row[0] < charged_s + 0.005 && row[2] == 0.0);
        return;
    }
    std::printf("no cgroup can be made here\n");
}

}  // namespace
