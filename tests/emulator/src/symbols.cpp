#include "emulator/symbols.h"

#include <dlfcn.h>

#include <cstdio>
#include <memory>
#include <sstream>
#include <stdexcept>

#include "emulator/place.h"

namespace emulator {
namespace {

std::string module_path() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&places_of), &info) == 0) throw std::runtime_error("dladdr failed");
  return info.dli_fname;
}

std::string hexadecimal(uint32_t number) {
  std::ostringstream text;
  text << "0x" << std::hex << number;
  return text.str();
}

std::vector<std::string> lines_of_command(const std::string& command) {
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), &pclose);
  if (!pipe) throw std::runtime_error("cannot run: " + command);
  std::vector<std::string> lines;
  char buffer[4096];
  while (std::fgets(buffer, sizeof buffer, pipe.get()) != nullptr) {
    std::string line = buffer;
    while (!line.empty() && line.back() == '\n') line.pop_back();
    lines.push_back(line);
  }
  return lines;
}

// A line of addr2line without "(discriminator 2)".
std::string place_of_line(const std::string& line) { return short_path(line.substr(0, line.find(' '))); }

bool is_of_the_emulator(const std::string& place) {
  return place.find("tests/emulator/include/") != std::string::npos || place[0] == '?';
}

}  // namespace

std::vector<std::string> places_of(const std::vector<uint32_t>& codes) {
  if (codes.empty()) return {};
  std::string command = "addr2line -a -i -e '" + module_path() + "'";
  // A return address is that of the next instruction.
  for (const uint32_t code : codes) command += " " + hexadecimal(code - 1);
  std::vector<std::string> places;
  for (const std::string& line : lines_of_command(command)) {
    if (line.rfind("0x", 0) == 0) {  // the head of the next instruction's places, innermost first
      places.push_back("?");
    } else if (!places.empty() && places.back() == "?" && !is_of_the_emulator(line)) {
      places.back() = place_of_line(line);
    }
  }
  places.resize(codes.size(), "?");
  return places;
}

std::string function_at(uint32_t code) {
  const auto lines = lines_of_command("addr2line -f -C -e '" + module_path() + "' " + hexadecimal(code));
  return lines.empty() ? "?" : lines.front();
}

}  // namespace emulator
