// Opens the driver that a spec names. A new driver needs one declaration and one line here.

#include "sensors/sensor.h"

#include <cmath>

#include "system/file.h"
#include "system/numbers.h"

namespace pepr {

std::unique_ptr<Sensor> open_hwmon(const std::string& where);
std::unique_ptr<Sensor> open_nvml(const std::string& where);
std::unique_ptr<Sensor> open_nvml_dense(const std::string& where);
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

constexpr Driver kDrivers[] = {
    {"hwmon", open_hwmon},
    {"nvml", open_nvml},
    {"nvml-dense", open_nvml_dense},
    {"nvml-processes", open_nvml_processes},
    {"perf", open_perf},
    {"perf-core", open_perf_core},
    {"powercap", open_powercap},
    {"processes", open_processes},
    {"replay", open_replay},
};

// Refuses a channel that could not be interpreted later, before anything is recorded.
void check_channels(const std::string& spec, const std::vector<Channel>& channels) {
    for (const Channel& channel : channels)
        if (!std::isfinite(channel.scale) || !std::isfinite(channel.modulus) || channel.modulus < 0)
            throw SensorError("sensor '" + spec + "' has a channel '" + channel.name +
                                  "' whose numbers mean nothing",
                              "its scale is " + std::to_string(channel.scale) + ", its modulus " +
                                  std::to_string(channel.modulus),
                              "give it a finite scale and a modulus of 0 or more");
}

}  // namespace

std::unique_ptr<Sensor> open_sensor(const std::string& spec) {
    const PlainLocale plain;  // for the messages of all drivers
    const auto colon = spec.find(':');
    const std::string kind = spec.substr(0, colon);
    const std::string where = colon == std::string::npos ? "" : spec.substr(colon + 1);
    std::string known;
    for (const Driver& driver : kDrivers) {
        if (kind == driver.kind) {
            auto sensor = driver.open(where);
            check_channels(spec, sensor->channels());
            return sensor;
        }
        known += known.empty() ? "" : ", ";
        known += driver.kind;
    }
    throw SensorError("sensor '" + spec + "' does not exist", "no driver is called '" + kind + "'",
                      "use kind[:where] with one of: " + known);
}

}  // namespace pepr
