// libnvidia-ml.so.1, simulated: NVML's ABI over a Scenario. Signatures and structs are nvml.h's
// own, so that a wrong one does not compile. Semantics: nvml.h and MEASUREMENT.md, A and B.
#include <dlfcn.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "nvml/scenario.h"

namespace {

using namespace pepr::sim;

std::mutex init_mutex;
unsigned references = 0;
// Every scenario this process has read. Kept: a call may still be running after the last shutdown.
std::vector<std::unique_ptr<Scenario>> scenarios;
// Published with release by load(), read with acquire by current().
std::atomic<const Scenario*> live{nullptr};
// A fork's child starts afresh. To compare getpid() at each call would cost more than most answers.
std::atomic<bool> forked{false};
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] {
    live.store(nullptr, std::memory_order_release);
    forked.store(true);
});

std::string scenario_path() {
    Dl_info self{};
    if (dladdr(reinterpret_cast<void*>(&nvmlInit_v2), &self) != 0) {
        const auto beside = std::string(self.dli_fname) + ".scenario";
        struct stat found{};
        if (stat(beside.c_str(), &found) == 0) return beside;
    }
    const char* named = std::getenv("PEPR_SIM_NVML");
    if (named == nullptr) {
        throw std::runtime_error("no scenario beside the library and no PEPR_SIM_NVML");
    }
    return named;
}

nvmlReturn_t initialise(const char* function) {
    const std::lock_guard lock(init_mutex);
    if (forked.exchange(false)) references = 0;
    if (references == 0) {
        try {
            scenarios.push_back(std::make_unique<Scenario>(scenario_path()));
        } catch (const std::exception& error) {
            std::fprintf(stderr, "simulated NVML: %s\n", error.what());
            return NVML_ERROR_UNKNOWN;
        }
    }
    const auto verdict = scenarios.back()->consult(function);
    if (verdict.code != NVML_SUCCESS) return verdict.code;
    live.store(scenarios.back().get(), std::memory_order_release);
    ++references;
    return NVML_SUCCESS;
}

const Scenario* current() { return live.load(std::memory_order_acquire); }

// A call in progress: initialised, its handle alive, its faults suffered; `code` says how far it
// got.
struct Call {
    explicit Call(const char* function) : scenario(current()) {
        if (scenario == nullptr) return;
        begin(function, -1);
    }

    Call(const char* function, nvmlDevice_t device, bool arguments_fit = true)
        : scenario(current()) {
        if (scenario == nullptr) return;
        for (const auto& each : scenario->gpus) {
            if (static_cast<const void*>(each.get()) == device) gpu = each.get();
        }
        code = NVML_ERROR_INVALID_ARGUMENT;
        if (gpu != nullptr && arguments_fit) begin(function, static_cast<int>(gpu->index));
    }

    bool ok() const { return code == NVML_SUCCESS; }

    const Scenario* scenario;
    const Gpu* gpu = nullptr;
    nvmlReturn_t code = NVML_ERROR_UNINITIALIZED;
    bool zero = false;
    double t_s = 0;

private:
    void begin(const char* function, int index) {
        const auto verdict = scenario->consult(function, index);
        code = verdict.code;
        zero = verdict.zero;
        t_s = scenario->now_s();
    }
};

nvmlReturn_t copy(const std::string& text, char* to, unsigned length) {
    if (to == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
    if (text.size() >= length) return NVML_ERROR_INSUFFICIENT_SIZE;
    std::memcpy(to, text.c_str(), text.size() + 1);
    return NVML_SUCCESS;
}

// The address is the handle; NVML's callers never look behind it.
nvmlDevice_t handle_of(const Gpu& gpu) {
    return reinterpret_cast<nvmlDevice_t>(const_cast<Gpu*>(&gpu));
}

nvmlReturn_t hand_out(const char* function, const Gpu& gpu, nvmlDevice_t* device) {
    const Call call(function, handle_of(gpu), device != nullptr);
    if (call.ok()) *device = handle_of(gpu);
    return call.code;
}

nvmlReturn_t power_of(const Gpu& gpu, unsigned field, unsigned scope, double t_s, unsigned& mw) {
    const Wave* wave = scope == NVML_POWER_SCOPE_GPU      ? &gpu.power
                       : scope == NVML_POWER_SCOPE_MODULE ? gpu.module.get()
                                                          : nullptr;
    const bool averages = field == NVML_FI_DEV_POWER_AVERAGE;
    if (wave == nullptr || (averages && !gpu.sensor.averages)) return NVML_ERROR_NOT_SUPPORTED;
    mw = averages ? gpu.average_mw(*wave, t_s) : gpu.instant_mw(*wave, t_s);
    return NVML_SUCCESS;
}

nvmlReturn_t energy_of(const Gpu& gpu, double t_s, unsigned long long& mj) {
    if (gpu.sensor.counter_refresh_s <= 0) return NVML_ERROR_NOT_SUPPORTED;
    mj = gpu.counter_mj(t_s);
    return NVML_SUCCESS;
}

void answer(const Gpu& gpu, nvmlFieldValue_t& value, double t_s) {
    switch (value.fieldId) {
        case NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION:
            value.valueType = NVML_VALUE_TYPE_UNSIGNED_LONG_LONG;
            value.nvmlReturn = energy_of(gpu, t_s, value.value.ullVal);
            break;
        case NVML_FI_DEV_POWER_AVERAGE:
        case NVML_FI_DEV_POWER_INSTANT:
            value.valueType = NVML_VALUE_TYPE_UNSIGNED_INT;
            value.nvmlReturn = power_of(gpu, value.fieldId, value.scopeId, t_s, value.value.uiVal);
            break;
        default: value.nvmlReturn = NVML_ERROR_NOT_SUPPORTED;
    }
}

nvmlReturn_t list_processes(const Call& call, unsigned int* count, nvmlProcessInfo_t* infos,
                            bool mps) {
    if (!call.ok()) return call.code;
    const unsigned room = *count;
    *count = 0;
    for (const auto& process : call.gpu->present()) {
        if (!process.runs(call.t_s) || process.mps != mps) continue;
        if (*count < room && infos != nullptr) {
            infos[*count] = {process.pid, process.used_bytes, process.instance, process.instance};
        }
        ++*count;
    }
    return *count > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

}  // namespace

nvmlReturn_t nvmlInit_v2() { return initialise(__func__); }
nvmlReturn_t nvmlInitWithFlags(unsigned int) { return initialise(__func__); }

nvmlReturn_t nvmlShutdown() {
    const std::lock_guard lock(init_mutex);
    if (current() == nullptr) return NVML_ERROR_UNINITIALIZED;
    if (--references == 0) live.store(nullptr, std::memory_order_release);
    return NVML_SUCCESS;
}

const char* nvmlErrorString(nvmlReturn_t result) {
    switch (static_cast<int>(result)) {
        case NVML_SUCCESS: return "Success";
        case NVML_ERROR_UNINITIALIZED: return "Uninitialized";
        case NVML_ERROR_INVALID_ARGUMENT: return "Invalid Argument";
        case NVML_ERROR_NOT_SUPPORTED: return "Not Supported";
        case NVML_ERROR_NO_PERMISSION: return "Insufficient Permissions";
        case NVML_ERROR_NOT_FOUND: return "Not Found";
        case NVML_ERROR_INSUFFICIENT_SIZE: return "Insufficient Size";
        case NVML_ERROR_DRIVER_NOT_LOADED: return "Driver Not Loaded";
        case NVML_ERROR_TIMEOUT: return "Timeout";
        case NVML_ERROR_GPU_IS_LOST: return "GPU is lost";
        case NVML_ERROR_RESET_REQUIRED: return "GPU requires reset";
        case NVML_ERROR_OPERATING_SYSTEM: return "The operating system has blocked the request";
        case NVML_ERROR_LIB_RM_VERSION_MISMATCH: return "Driver/library version mismatch";
        default: return "Unknown Error";
    }
}

nvmlReturn_t nvmlSystemGetDriverVersion(char* version, unsigned int length) {
    const Call call(__func__);
    return call.ok() ? copy(call.scenario->driver_version, version, length) : call.code;
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int* count) {
    const Call call(__func__);
    if (call.ok()) *count = static_cast<unsigned>(call.scenario->gpus.size());
    return call.code;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t* device) {
    const auto* scenario = current();
    if (scenario == nullptr) return NVML_ERROR_UNINITIALIZED;
    if (index >= scenario->gpus.size()) return NVML_ERROR_INVALID_ARGUMENT;
    return hand_out(__func__, *scenario->gpus[index], device);
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char* uuid, nvmlDevice_t* device) {
    const auto* scenario = current();
    if (scenario == nullptr) return NVML_ERROR_UNINITIALIZED;
    if (uuid == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
    for (const auto& gpu : scenario->gpus) {
        if (gpu->uuid == uuid) return hand_out(__func__, *gpu, device);
    }
    return NVML_ERROR_NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char* uuid, unsigned int length) {
    const Call call(__func__, device);
    return call.ok() ? copy(call.gpu->uuid, uuid, length) : call.code;
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char* name, unsigned int length) {
    const Call call(__func__, device);
    return call.ok() ? copy(call.gpu->name, name, length) : call.code;
}

nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned int* index) {
    const Call call(__func__, device, index != nullptr);
    if (call.ok()) *index = call.gpu->index;
    return call.code;
}

nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long* energy) {
    const Call call(__func__, device, energy != nullptr);
    if (!call.ok()) return call.code;
    const auto code = energy_of(*call.gpu, call.t_s, *energy);
    if (call.zero) *energy = 0;
    return code;
}

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned int* power) {
    const Call call(__func__, device, power != nullptr);
    if (!call.ok()) return call.code;
    const auto field =
        call.gpu->sensor.averages ? NVML_FI_DEV_POWER_AVERAGE : NVML_FI_DEV_POWER_INSTANT;
    const auto code = power_of(*call.gpu, field, NVML_POWER_SCOPE_GPU, call.t_s, *power);
    if (call.zero) *power = 0;
    return code;
}

nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, nvmlFieldValue_t* values) {
    const Call call(__func__, device, values != nullptr && count > 0);
    if (!call.ok()) return call.code;
    for (auto* value = values; value != values + count; ++value) {
        const auto verdict = call.scenario->consult(__func__, static_cast<int>(call.gpu->index),
                                                    static_cast<int>(value->fieldId));
        answer(*call.gpu, *value, call.t_s);
        value->timestamp = call.scenario->unix_us(call.t_s);
        value->latencyUsec = 0;
        if (call.zero || verdict.zero) value->value.ullVal = 0;
        if (verdict.code != NVML_SUCCESS) value->nvmlReturn = verdict.code;
    }
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t* utilization) {
    const Call call(__func__, device, utilization != nullptr);
    if (!call.ok()) return call.code;
    const auto& gpu = *call.gpu;
    if (gpu.mig == NVML_DEVICE_MIG_ENABLE) return NVML_ERROR_NOT_SUPPORTED;
    *utilization = {gpu.percent(gpu.utilization, call.t_s),
                    gpu.percent(gpu.memory_utilization, call.t_s)};
    if (call.zero) *utilization = {};
    return NVML_SUCCESS;
}

// The first version counts what the driver reserves as used, the second counts it apart.
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t* memory) {
    const Call call(__func__, device, memory != nullptr);
    if (!call.ok()) return call.code;
    const auto& gpu = *call.gpu;
    const auto used = gpu.used_bytes(call.t_s) + gpu.memory_reserved_bytes;
    *memory = {gpu.memory_total_bytes, gpu.memory_total_bytes - used, used};
    if (call.zero) *memory = {};
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t* memory) {
    const Call call(__func__, device, memory != nullptr);
    if (!call.ok()) return call.code;
    if (memory->version != nvmlMemory_v2) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    const auto& gpu = *call.gpu;
    const auto used = gpu.used_bytes(call.t_s), reserved = gpu.memory_reserved_bytes;
    *memory = {nvmlMemory_v2, gpu.memory_total_bytes, reserved,
               gpu.memory_total_bytes - reserved - used, used};
    if (call.zero) *memory = {nvmlMemory_v2, 0, 0, 0, 0};
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned int* count,
                                                     nvmlProcessInfo_t* infos) {
    return list_processes(Call(__func__, device, count != nullptr), count, infos, false);
}

nvmlReturn_t nvmlDeviceGetMPSComputeRunningProcesses_v3(nvmlDevice_t device, unsigned int* count,
                                                        nvmlProcessInfo_t* infos) {
    return list_processes(Call(__func__, device, count != nullptr), count, infos, true);
}

nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t device,
                                             nvmlProcessUtilizationSample_t* utilization,
                                             unsigned int* count, unsigned long long last_seen_us) {
    const Call call(__func__, device, count != nullptr);
    if (!call.ok()) return call.code;
    if (call.gpu->mig == NVML_DEVICE_MIG_ENABLE) return NVML_ERROR_NOT_SUPPORTED;
    const double at_s = call.gpu->sensor.last_refresh_s(call.t_s, kUtilizationPeriod_s);
    const auto at_us = static_cast<unsigned long long>(call.scenario->unix_us(at_s));
    const double from_s = std::max(call.scenario->since_epoch_s(last_seen_us),
                                   at_s - kUtilizationMemory * kUtilizationPeriod_s);
    // Means over the time since then; a process may be in the scenario several times, one after
    // the other.
    std::map<unsigned, std::pair<double, double>> used;
    for (const auto& process : call.gpu->present()) {
        const double overlap_s = std::min(at_s, process.end_s) - std::max(from_s, process.start_s);
        if (at_us <= last_seen_us || overlap_s <= 0) continue;
        auto& [sm, mem] = used[process.pid];
        sm += process.sm * overlap_s / (at_s - from_s);
        mem += process.mem * overlap_s / (at_s - from_s);
    }
    const unsigned room = utilization == nullptr ? 0 : *count;
    *count = 0;
    for (const auto& [pid, parts] : used) {
        const auto percent = [](double part) { return static_cast<unsigned>(100 * part + 0.5); };
        const auto [sm, mem] = parts;
        if (percent(sm + mem) == 0) continue;
        if (*count < room) utilization[*count] = {pid, at_us, percent(sm), percent(mem), 0, 0};
        ++*count;
    }
    if (*count == 0) return NVML_ERROR_NOT_FOUND;
    return *count > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetSamples(nvmlDevice_t device, nvmlSamplingType_t type,
                                  unsigned long long last_seen_us, nvmlValueType_t* value_type,
                                  unsigned int* count, nvmlSample_t* samples) {
    constexpr unsigned kBuffer = 120;  // MEASUREMENT.md, A (unverified there)
    const bool fits =
        count != nullptr && value_type != nullptr && (samples == nullptr || *count > 0);
    const Call call(__func__, device, fits);
    if (!call.ok()) return call.code;
    if (type != NVML_TOTAL_POWER_SAMPLES) return NVML_ERROR_NOT_SUPPORTED;
    *value_type = NVML_VALUE_TYPE_UNSIGNED_INT;
    if (samples == nullptr) {
        *count = kBuffer;
        return NVML_SUCCESS;
    }
    const auto& sensor = call.gpu->sensor;
    const double last_tick = std::floor((call.t_s - sensor.phase_s) / sensor.samples_refresh_s);
    const unsigned room = *count;
    *count = 0;
    for (unsigned age = kBuffer; age-- > 0 && *count < room;) {
        const double at_s = (last_tick - age) * sensor.samples_refresh_s + sensor.phase_s;
        const auto at_us = static_cast<unsigned long long>(call.scenario->unix_us(at_s));
        if (at_us <= last_seen_us) continue;
        samples[*count].timeStamp = at_us;
        samples[*count].sampleValue.ullVal = 0;
        samples[*count].sampleValue.uiVal = call.zero ? 0 : call.gpu->sample_mw(at_s);
        ++*count;
    }
    return *count == 0 ? NVML_ERROR_NOT_FOUND : NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t* pci) {
    const Call call(__func__, device, pci != nullptr);
    if (!call.ok()) return call.code;
    *pci = {};
    pci->bus = call.gpu->index + 1;
    pci->pciDeviceId = 0x233010DE;  // H100 80GB HBM3
    std::snprintf(pci->busId, sizeof pci->busId, NVML_DEVICE_PCI_BUS_ID_FMT, pci->domain, pci->bus,
                  pci->device);
    std::snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, NVML_DEVICE_PCI_BUS_ID_LEGACY_FMT,
                  pci->domain & 0xFFFF, pci->bus & 0xFF, pci->device & 0x1F);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t device, unsigned int* least,
                                                          unsigned int* most) {
    const Call call(__func__, device, least != nullptr && most != nullptr);
    if (!call.ok()) return call.code;
    if (call.gpu->power_limit_w <= 0) return NVML_ERROR_NOT_SUPPORTED;
    *most = static_cast<unsigned>(1e3 * call.gpu->power_limit_w);
    *least = *most / 4;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned int* now, unsigned int* pending) {
    const Call call(__func__, device, now != nullptr && pending != nullptr);
    if (!call.ok()) return call.code;
    if (call.gpu->mig < 0) return NVML_ERROR_NOT_SUPPORTED;
    *now = *pending = static_cast<unsigned>(call.gpu->mig);
    return NVML_SUCCESS;
}

// What follows is no sensor: other programs ask it before they look at one.

// The oldest that has such sensors. Programs tell by it whether there is an energy counter.
nvmlReturn_t nvmlDeviceGetArchitecture(nvmlDevice_t device, nvmlDeviceArchitecture_t* arch) {
    const Call call(__func__, device, arch != nullptr);
    if (!call.ok()) return call.code;
    const auto& sensor = call.gpu->sensor;
    *arch = sensor.counter_refresh_s <= 0 ? NVML_DEVICE_ARCH_PASCAL
            : sensor.averages             ? NVML_DEVICE_ARCH_HOPPER
                                          : NVML_DEVICE_ARCH_VOLTA;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetC2cModeInfoV(nvmlDevice_t device, nvmlC2cModeInfo_v1_t* info) {
    const Call call(__func__, device, info != nullptr);
    return call.ok() ? NVML_ERROR_NOT_SUPPORTED : call.code;
}

nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, nvmlTemperatureSensors_t,
                                      unsigned int* celsius) {
    const Call call(__func__, device, celsius != nullptr);
    if (call.ok()) *celsius = 45;
    return call.code;
}

nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned int* limit_mw) {
    const Call call(__func__, device, limit_mw != nullptr);
    if (!call.ok()) return call.code;
    if (call.gpu->power_limit_w <= 0) return NVML_ERROR_NOT_SUPPORTED;
    *limit_mw = static_cast<unsigned>(1e3 * call.gpu->power_limit_w);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetComputeMode(nvmlDevice_t device, nvmlComputeMode_t* mode) {
    const Call call(__func__, device, mode != nullptr);
    if (call.ok()) *mode = NVML_COMPUTEMODE_DEFAULT;
    return call.code;
}

nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t device, unsigned int* count,
                                                      nvmlProcessInfo_t*) {
    const Call call(__func__, device, count != nullptr);
    if (call.ok()) *count = 0;
    return call.code;
}
