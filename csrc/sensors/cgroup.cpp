// CPU time and memory of a cgroup of version 2 and of all groups below it, as the kernel counts
// them: `processes:cgroup=/sys/fs/cgroup/x`. What came and went is in its CPU time, and what joined
// it from elsewhere counts from then on.
//
// The group need not exist yet, and may end or come again: a container is often made by the command
// that is measured. Memory is what its processes have resident, as in a process tree. What the
// kernel charges to the group is given besides, because that includes files in its cache.

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "sensors/machine_time.h"
#include "sensors/process_channels.h"
#include "sensors/process_stat.h"
#include "system/clock.h"
#include "system/numbers.h"

namespace pepr {

namespace {

// Who is in the group is read at most so often that a sample reads so many of its processes, 15 µs
// each, and groups, which cost twice that.
constexpr std::size_t kReadsPerSample = 24, kReadsPerGroup = 2;
constexpr int kDeepest = 16;  // groups within each other

constexpr const char* kCgroup = "cgroup=";

bool read_number(const File& file, double& value) noexcept {
    char text[32];
    const std::size_t length = file.read(text, sizeof text);
    const char* at = text;
    std::uint64_t number = 0;
    if (!parse_number(at, text + length, number)) return false;
    value = static_cast<double>(number);
    return true;
}

double number_or_unknown(const File& file) noexcept {
    double value = kUnknown;
    return file && read_number(file, value) ? value : kUnknown;
}

// CPU time of a group since it was made, s. False for one that was removed.
bool read_usage(const File& file, double& usage_s) noexcept {
    constexpr const char* kName = "usage_usec";
    char text[512];
    const std::size_t length = file.read(text, sizeof text);
    const char* at = std::strstr(text, kName);
    std::uint64_t us = 0;
    if (length == 0 || at == nullptr || !parse_number(at += std::strlen(kName), text + length, us))
        return false;
    usage_s = 1e-6 * static_cast<double>(us);
    return true;
}

File open_at(const File& folder, const char* name, int flags = 0) noexcept {
    File file(::openat(folder.fd(), name, O_RDONLY | O_CLOEXEC | flags));
    file.remember();
    return file;
}

class Cgroup final : public Sensor {
public:
    explicit Cgroup(const std::string& where) : path_(where.substr(std::strlen(kCgroup))) {
        if (!machine_)
            throw SensorError("the machine's CPU time cannot be read", "/proc is not mounted",
                              "mount /proc (mount -t proc proc /proc)");
        channels_ = process_channels(where, "cpu.stat");
        const bool exists = ::access(path_.c_str(), F_OK) == 0;
        has_memory_ = add_memory("current", exists);
        has_peak_ = add_memory("peak", exists);
        if (!exists) return;  // it may be made yet
        const char* const what = "the cgroup cannot be followed";
        if (!open_group())
            throw SensorError(what, path_ + "/cpu.stat: " + std::strerror(errno),
                              "name the folder of a cgroup of version 2 that you may read");
        if (!read_usage(usage_, usage_s_))
            throw SensorError(what,
                              path_ + "/cpu.stat has no usage_usec, as in cgroups of version 1",
                              "name a cgroup of version 2: mount | grep cgroup2");
        before_s_ = usage_s_;
        own_before_s_ = own_s();
        look();
        is_inside_ = sees_us_;
    }

    void poll(double* out) noexcept override {
        const double busy_s = machine_.busy_s();
        follow();
        // The kernel adds what runs now at its next tick only, and our clock has it at once.
        cpu_s_ = std::max(cpu_s_, ended_s_ + used_s());
        out[0] = cpu_s_;
        out[1] = static_cast<double>(rss_bytes_);
        out[2] = static_cast<double>(living_);
        out[3] = busy_s;
        // A group that is not there has no memory.
        double* next = out + 4;
        if (has_memory_) *next++ = usage_ ? number_or_unknown(memory_) : 0.0;
        if (has_peak_) *next = usage_ ? number_or_unknown(peak_) : 0.0;
    }

    void finish() noexcept override { due_ = 0; }

private:
    // Describes what the kernel charges to the group, if it does so. `exists`: the group does.
    bool add_memory(const std::string& name, bool exists) {
        if (exists && ::access((path_ + "/memory." + name).c_str(), R_OK) != 0) return false;
        channels_.push_back(
            {"job/memory-" + name, "memory", "B", 1.0, 0.0, false, "cgroup", {{"scope", "job"}}});
        return true;
    }

    static double own_s() noexcept {
        return 1e-9 * static_cast<double>(read_clock_ns(CLOCK_PROCESS_CPUTIME_ID));
    }

    // Since we began; without what we used ourselves.
    double used_s() const noexcept {
        return usage_s_ - before_s_ - (is_inside_ ? own_s() - own_before_s_ : 0.0);
    }

    // Reads the group, or finds out that it has ended, or exists by now.
    void follow() noexcept {
        double usage_s = 0;
        if (usage_ && !read_usage(usage_, usage_s)) end_group();
        if (!usage_ && open_group() && !read_usage(usage_, usage_s)) close();
        if (!usage_) return;
        usage_s_ = usage_s;
        double above_s = 0;
        has_parent_ = above_ && read_usage(above_, above_s);
        others_rate_s_ = above_s - above_s_ - (usage_s - usage_before_s_);
        above_s_ = above_s;
        usage_before_s_ = usage_s;
        if (is_empty()) {
            living_ = rss_bytes_ = 0;
        } else if (living_ == 0 || due_ <= kReadsPerSample) {
            look();
        } else {
            due_ -= kReadsPerSample;
        }
    }

    // What it used after the last sample is in the group above it, where it stays. Others of that
    // group are taken to go on as they did between the last two samples.
    void end_group() noexcept {
        double above_s = 0;
        if (has_parent_ && read_usage(above_, above_s))
            usage_s_ += std::max(0.0, above_s - above_s_ - std::max(0.0, others_rate_s_));
        ended_s_ += used_s();
        before_s_ = usage_s_ = usage_before_s_ = above_s_ = 0.0;
        living_ = rss_bytes_ = due_ = 0;
        is_inside_ = has_parent_ = false;
        close();
    }

    void close() noexcept {
        for (File* file : {&usage_, &above_, &events_, &memory_, &peak_}) *file = File();
    }

    bool open_group() noexcept {
        const File folder(path_.c_str(), O_DIRECTORY);
        if (!folder) return false;
        usage_ = moved_up(open_at(folder, "cpu.stat"));
        if (!usage_) return false;
        above_ = moved_up(open_at(folder, "../cpu.stat"));
        events_ = moved_up(open_at(folder, "cgroup.events"));
        memory_ = moved_up(open_at(folder, "memory.current"));
        peak_ = moved_up(open_at(folder, "memory.peak"));
        return true;
    }

    // The kernel knows at once; what is no real cgroup does not say.
    bool is_empty() const noexcept {
        char text[128];
        return events_ && events_.read(text, sizeof text) > 0 &&
               std::strstr(text, "populated 0") != nullptr;
    }

    // --- who is in it ----------------------------------------------------------------------------

    void look() noexcept {
        living_ = rss_bytes_ = due_ = 0;
        sees_us_ = false;
        look(File(path_.c_str(), O_DIRECTORY), kDeepest);
    }

    void look(const File& folder, int deeper) noexcept {
        if (!folder) return;
        due_ += kReadsPerGroup;
        count(open_at(folder, "cgroup.procs"));
        if (deeper == 0) return;
        visit_entries(folder, [&](const dirent64& entry) {
            if (entry.d_type == DT_DIR && entry.d_name[0] != '.')
                look(open_at(folder, entry.d_name, O_DIRECTORY), deeper - 1);
        });
    }

    void count(const File& processes) noexcept {
        std::array<char, 2048> text;
        std::size_t rest = 0;  // of a number that is cut
        for (ssize_t n; processes &&
                        (n = ::read(processes.fd(), text.data() + rest, text.size() - rest)) > 0;) {
            const char* at = text.data();
            const char* const end = at + rest + n;
            while (const void* const line =
                       std::memchr(at, '\n', static_cast<std::size_t>(end - at))) {
                pid_t pid = 0;
                if (parse_number(at, end, pid)) count(pid);
                at = static_cast<const char*>(line) + 1;
            }
            rest = static_cast<std::size_t>(end - at);
            std::memmove(text.data(), at, rest);
            if (rest == text.size()) return;  // no such number
        }
    }

    void count(pid_t pid) noexcept {
        ++due_;
        if (pid == self_) {
            sees_us_ = true;
            return;
        }
        ProcessStat stat{};
        if (pid == 0) {  // of another namespace
            ++living_;
        } else if (read_stat(open_stat(pid), pid, stat, tick_s_, page_bytes_) && stat.living) {
            ++living_;
            rss_bytes_ += stat.rss_bytes;
        }
    }

    const std::string path_;
    const pid_t self_ = ::getpid();
    const double tick_s_ = 1.0 / static_cast<double>(::sysconf(_SC_CLK_TCK));
    const std::uint64_t page_bytes_ = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    MachineTime machine_;
    File usage_, above_, events_, memory_, peak_;  // `above_`: of the group that it is in
    double usage_s_ = 0.0, before_s_ = 0.0;        // since the group was made; when we began
    double ended_s_ = 0.0;                         // of groups of this path that have ended
    double cpu_s_ = 0.0, own_before_s_ = 0.0;
    double usage_before_s_ = 0.0, above_s_ = 0.0, others_rate_s_ = 0.0;  // at the last sample
    bool has_memory_ = false, has_peak_ = false, has_parent_ = false, sees_us_ = false,
         is_inside_ = false;
    std::size_t living_ = 0, rss_bytes_ = 0;
    std::size_t due_ = 0;  // what the last look has read beyond what samples may
};

}  // namespace

std::unique_ptr<Sensor> open_cgroup(const std::string& where) {
    if (where.size() <= std::strlen(kCgroup) || where[std::strlen(kCgroup)] != '/')
        throw SensorError("sensor 'processes:" + where + "' does not exist",
                          "the cgroup to follow is not stated",
                          "use processes:cgroup=/sys/fs/cgroup/NAME");
    return std::make_unique<Cgroup>(where);
}

}  // namespace pepr
