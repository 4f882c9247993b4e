#include "sensor.h"

#include <array>

namespace pepr {

std::unique_ptr<Sensor> open_hwmon(const std::string& where);
std::unique_ptr<Sensor> open_nvml(const std::string& where);
std::unique_ptr<Sensor> open_nvml_processes(const std::string& where);
std::unique_ptr<Sensor> open_perf(const std::string& where);
std::unique_ptr<Sensor> open_perf_core(const std::string& where);
std::unique_ptr<Sensor> open_powercap(const std::string& where);
std::unique_ptr<Sensor> open_processes(const std::string& where);
std::unique_ptr<Sensor> open_replay(const std::string& where);

namespace {

struct Driver {
    const char* kind;
    std::unique_ptr<Sensor> (*open)(const std::string& where);
};

constexpr std::array<Driver, 8> kDrivers{{
    {"hwmon", open_hwmon},
    {"nvml", open_nvml},
    {"nvml-processes", open_nvml_processes},
    {"perf", open_perf},
    {"perf-core", open_perf_core},
    {"powercap", open_powercap},
    {"processes", open_processes},
    {"replay", open_replay},
}};

}  // namespace

std::unique_ptr<Sensor> open_sensor(const std::string& spec) {
    const auto colon = spec.find(':');
    const std::string kind = spec.substr(0, colon);
    const std::string where = colon == std::string::npos ? "" : spec.substr(colon + 1);
    std::string known;
    for (const Driver& driver : kDrivers) {
        if (kind == driver.kind) return driver.open(where);
        known += known.empty() ? "" : ", ";
        known += driver.kind;
    }
    throw SensorError("sensor '" + spec + "' does not exist", "no driver is called '" + kind + "'",
                      "use kind[:where] with one of: " + known);
}

}  // namespace pepr
