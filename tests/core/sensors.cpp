// Files that drivers read, damaged ones too.

#include <random>
#include <utility>

#include "core_test.h"

namespace {

TEST(replay_names_the_bad_line) {
    const Folder folder;
    const std::string path =
        folder.write("bad", "# comment\n" + std::string(kChannels) + "0\t1\t2\n0.1\t1\n");
    try {
        pepr::open_sensor("replay:" + path);
        CHECK(!"opened a file with a bad line");
    } catch (const pepr::SensorError& error) {
        CHECK(std::string(error.what()).find(path + ":5") != std::string::npos);
    }
}

// --- files that are damaged ---------------------------------------------------------------------

// The text with a few of its bytes changed, doubled, cut out or cut off.
std::string damaged(std::string text, std::mt19937& random) {
    static const char* const kOdd[] = {"nan", "inf", "-1", "1e999", "\t", "\n", "=", "\xff", "0x9"};
    const auto any = [&random](std::size_t n) { return n > 0 ? random() % n : 0; };
    for (std::size_t changes = 1 + any(3); changes > 0; --changes) {
        const std::size_t at = any(text.size());
        switch (any(5)) {
            case 0: text.insert(at, kOdd[any(std::size(kOdd))]); break;
            case 1: text.erase(at, any(8)); break;
            case 2: text.insert(at, text.substr(any(text.size()), any(40))); break;
            case 3: text.resize(at); break;
            default:
                if (!text.empty()) text[at] = static_cast<char>(random());
        }
    }
    return text;
}

// Whatever a file holds, a sensor opens and is read, or says what, why and the fix.
void open_and_read(const std::string& spec, int& opened) {
    try {
        const auto sensor = pepr::open_sensor(spec);
        std::vector<double> row(sensor->channels().size());
        sensor->poll(row.data());
        for (const pepr::Channel& channel : sensor->channels())
            CHECK(std::isfinite(channel.scale) && channel.modulus >= 0);
        ++opened;
    } catch (const pepr::SensorError& error) {
        CHECK(*error.what() != '\0' && !error.note.why.empty() && !error.note.fix.empty());
    }
}

TEST(replays_that_are_damaged_are_read_or_refused) {
    const Folder folder;
    std::mt19937 random(1);
    int opened = 0;
    for (int i = 0; i < 2000; ++i) {
        const std::string text = std::string(kChannels) + "0\t1\t2\n0.1\t1.5\tnan\n1e3\t2\t-3\n";
        open_and_read("replay:" + folder.write("odd", damaged(text, random)), opened);
    }
    CHECK(opened > 100 && opened < 1900);
}

TEST(sysfs_that_is_damaged_is_read_or_refused) {
    const Folder folder;
    const fs::path root = folder.write("here", "");
    const fs::path zone = root.parent_path() / "powercap" / "intel-rapl:0";
    const fs::path chip = root.parent_path() / "hwmon" / "hwmon0";
    fs::create_directories(zone);
    fs::create_directories(chip);
    const std::pair<fs::path, const char*> files[] = {
        {zone / "name", "package-0\n"},          {zone / "energy_uj", "4711\n"},
        {zone / "max_energy_range_uj", "65\n"},  {chip / "name", "amdgpu\n"},
        {chip / "power1_average", "25000000\n"}, {chip / "power1_label", "PPT\n"},
        {chip / "energy1_input", "123456\n"},
    };
    std::mt19937 random(2);
    int opened = 0;
    for (int i = 0; i < 300; ++i) {
        for (const auto& [path, text] : files) {
            std::ofstream(path) << (random() % 2 ? damaged(text, random) : text);
            if (random() % 16 == 0) fs::remove(path);
        }
        open_and_read("powercap:" + zone.parent_path().string(), opened);
        open_and_read("hwmon:" + chip.parent_path().string(), opened);
    }
    CHECK(opened > 100);
}

}  // namespace
