// The CPU time of the whole machine, and how much a hypervisor stole of it.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include <unistd.h>

#include "sensors/sensor.h"
#include "system/file.h"
#include "system/numbers.h"

namespace pepr {

// CPU time of the whole machine since it booted, s.
//
// /proc/stat has it, but sums every interrupt of every CPU for each read. The root of cgroup v2 has
// the same sums and is cheaper (root_cgroup_cputime of kernel/cgroup/rstat.c, Linux 5.8 and later),
// but it has no stolen time.
class MachineTime {
public:
    explicit MachineTime(const std::string& root = "")
        : stat_(moved_up(File(root + "/proc/stat"))) {
        for (const char* folder : {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}) {
            const std::string path = root + folder;
            // Only the root group has no type. A container may see its own group in its place.
            if (::access((path + "/cgroup.type").c_str(), F_OK) == 0) continue;
            root_group_ = moved_up(File(path + "/cpu.stat"));
            if (double busy_s; read_group(busy_s)) return;
        }
        root_group_ = File();
    }
    explicit operator bool() const noexcept { return static_cast<bool>(stat_); }

    // Of user, system and interrupts. User includes what guests use.
    double busy_s() noexcept {
        double busy_s = kUnknown;
        if (!root_group_ || !read_group(busy_s)) read_stat(busy_s);
        return busy_s;
    }

    // What a hypervisor stole, in whole ticks. Read now, unless busy_s() has just read it.
    double stolen_s() noexcept {
        double busy_s;
        if (root_group_) read_stat(busy_s);
        return stolen_s_;
    }

private:
    bool read_group(double& busy_s) const noexcept {
        char text[512];
        const std::size_t length = root_group_.read(text, sizeof text);
        std::uint64_t sum_us = 0;
        for (const char* name : {"\nuser_usec", "\nsystem_usec"}) {
            const char* at = std::strstr(text, name);
            std::uint64_t us = 0;
            if (at == nullptr || !parse_number(at += std::strlen(name), text + length, us))
                return false;
            sum_us += us;
        }
        busy_s = 1e-6 * static_cast<double>(sum_us);
        return true;
    }

    // user nice system idle iowait irq softirq steal guest guest_nice, in ticks.
    void read_stat(double& busy_s) noexcept {
        char text[256];
        const std::size_t length = stat_.read(text, sizeof text);
        const char* at = text + std::strlen("cpu");
        std::uint64_t ticks[8] = {};
        busy_s = stolen_s_ = kUnknown;
        for (std::uint64_t& value : ticks)
            if (length == 0 || !parse_number(at, text + length, value)) return;
        const auto busy = ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6];
        busy_s = static_cast<double>(busy) * tick_s_;
        stolen_s_ = static_cast<double>(ticks[7]) * tick_s_;
    }

    const double tick_s_ = 1.0 / static_cast<double>(::sysconf(_SC_CLK_TCK));
    const File stat_;
    File root_group_;
    double stolen_s_ = kUnknown;
};

}  // namespace pepr
