// Loads NVIDIA's driver library at run time: the same build runs with and without a driver.
#pragma once

#include <array>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <dlfcn.h>
#include <nvml.h>

#include "sensors/sensor.h"

namespace pepr::nvml {

// How to mend what makes NVML answer so.
std::string remedy(nvmlReturn_t code);

struct LoadedLibrary {
    void* handle;
    std::string path;
};

// Loads the library at path `where`. If that is empty, the usual one is loaded as the loader finds
// it, else from the folders where drivers put it. If it is a directory, it is taken for such a
// folder, else for a root that has them, as "/host" in a container. Throws SensorError.
LoadedLibrary load_library(const std::string& where);

// The library and its functions. Macros of nvml.h rename a function to its newest version, so each
// is looked up by its real name. One that the driver is too old for is null.
struct Library {
    // As load_library. Throws SensorError.
    explicit Library(const std::string& where) : Library(load_library(where)) {
        if (!init || !shutdown || !count || !by_index || !uuid)
            throw SensorError(path + " is not a usable NVML",
                              "it lacks calls that every driver since 2013 has",
                              "check the path after nvml:, or update the driver");
    }
    explicit Library(LoadedLibrary loaded) : path(std::move(loaded.path)), handle(loaded.handle) {}
    ~Library() {
        if (started) shutdown();
        if (handle != nullptr) ::dlclose(handle);
    }
    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;

    struct Symbol {
        void* address;
        template <typename F>
        operator F*() const {
            return reinterpret_cast<F*>(address);
        }
    };
    // Starts NVML and returns the number of GPUs. Throws SensorError.
    unsigned start() {
        check(init(), "NVML does not start");
        started = true;
        unsigned gpus = 0;
        check(count(&gpus), "NVML does not count its GPUs");
        std::array<char, NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE> version{};
        if (driver_version &&
            driver_version(version.data(), static_cast<unsigned>(version.size())) == NVML_SUCCESS)
            driver = version.data();
        return gpus;
    }

    Symbol find(const char* symbol) const { return {handle ? ::dlsym(handle, symbol) : nullptr}; }

    void check(nvmlReturn_t code, const std::string& what) const {
        if (code != NVML_SUCCESS) throw SensorError(note(what, code));
    }

    Note note(const std::string& what, nvmlReturn_t code) const {
        const std::string text = error_string ? error_string(code) : "NVML error";
        const std::string why = text + " (" + std::to_string(static_cast<int>(code)) + ")";
        if (code == NVML_ERROR_NO_PERMISSION) return denied(what, why, remedy(code));
        return {what, why, remedy(code)};
    }

    std::string path;
    void* handle = nullptr;
    bool started = false;
    std::string driver;  // the driver's version; empty if it does not say
    decltype(&nvmlInit_v2) init = find("nvmlInit_v2");
    decltype(&nvmlShutdown) shutdown = find("nvmlShutdown");
    decltype(&nvmlErrorString) error_string = find("nvmlErrorString");
    decltype(&nvmlSystemGetDriverVersion) driver_version = find("nvmlSystemGetDriverVersion");
    decltype(&nvmlDeviceGetCount_v2) count = find("nvmlDeviceGetCount_v2");
    decltype(&nvmlDeviceGetHandleByIndex_v2) by_index = find("nvmlDeviceGetHandleByIndex_v2");
    decltype(&nvmlDeviceGetUUID) uuid = find("nvmlDeviceGetUUID");
    decltype(&nvmlDeviceGetName) name = find("nvmlDeviceGetName");
    decltype(&nvmlDeviceGetTotalEnergyConsumption) energy =
        find("nvmlDeviceGetTotalEnergyConsumption");
    decltype(&nvmlDeviceGetPowerUsage) power = find("nvmlDeviceGetPowerUsage");
    decltype(&nvmlDeviceGetFieldValues) fields = find("nvmlDeviceGetFieldValues");
    decltype(&nvmlDeviceGetUtilizationRates) utilisation = find("nvmlDeviceGetUtilizationRates");
    decltype(&nvmlDeviceGetMemoryInfo) memory = find("nvmlDeviceGetMemoryInfo");
    decltype(&nvmlDeviceGetPowerManagementLimitConstraints) limits =
        find("nvmlDeviceGetPowerManagementLimitConstraints");
    decltype(&nvmlDeviceGetEnforcedPowerLimit) enforced_limit =
        find("nvmlDeviceGetEnforcedPowerLimit");
    decltype(&nvmlDeviceGetMigMode) mig = find("nvmlDeviceGetMigMode");
    decltype(&nvmlDeviceGetComputeRunningProcesses_v3) processes =
        find("nvmlDeviceGetComputeRunningProcesses_v3");
    decltype(processes) mps_processes = find("nvmlDeviceGetMPSComputeRunningProcesses_v3");
    decltype(&nvmlDeviceGetProcessUtilization) process_utilisation =
        find("nvmlDeviceGetProcessUtilization");
};

// Whether a call that failed so will always fail. Others may work again (a lost GPU, a time-out).
inline bool is_permanent(nvmlReturn_t code) noexcept {
    return code == NVML_ERROR_NOT_SUPPORTED || code == NVML_ERROR_FUNCTION_NOT_FOUND ||
           code == NVML_ERROR_INVALID_ARGUMENT || code == NVML_ERROR_NO_PERMISSION;
}

// The error for a sensor that found nothing to read.
SensorError nothing_found(const std::vector<Note>& notes);

// A GPU's handle and names, read once when a sensor opens.
struct Board {
    nvmlDevice_t device = nullptr;
    std::map<std::string, std::string> labels;
    bool mig = false;
};

// Fills in the board at `index`. Returns NVML_SUCCESS, or why it cannot be opened.
nvmlReturn_t open_board(const Library& library, unsigned index, Board& board);

}  // namespace pepr::nvml
