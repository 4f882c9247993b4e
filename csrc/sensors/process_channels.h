// The channels of a lane of processes: what the job and the machine did.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <unistd.h>

#include "sensors/sensor.h"

namespace pepr {

// What a tree and a cgroup have in common, in this order: job/cpu, job/rss, job/processes,
// system/busy. `where` is what is followed, `source` what counts its CPU time.
inline std::vector<Channel> process_channels(const std::string& where, const std::string& source) {
    const std::string cpus = std::to_string(::sysconf(_SC_NPROCESSORS_ONLN));
    const auto memory = static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) *
                        static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    std::vector<Channel> channels;
    const auto add = [&](const char* name, const char* quantity, const char* unit, bool counter,
                         std::map<std::string, std::string> labels) {
        channels.push_back({name, quantity, unit, 1.0, 0.0, counter, "procfs", std::move(labels)});
    };
    add("job/cpu", "cpu_time", "s", true, {{"scope", "job"}, {"root", where}, {"source", source}});
    add("job/rss", "memory", "B", false,
        {{"scope", "job"}, {"installed_bytes", std::to_string(memory)}});
    add("job/processes", "count", "1", false, {{"scope", "job"}});
    add("system/busy", "cpu_time", "s", true, {{"scope", "system"}, {"cpus", cpus}});
    return channels;
}

}  // namespace pepr
