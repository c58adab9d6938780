#include "emulator/place.h"

namespace emulator {

std::string short_path(const std::string& path) {
  for (const char* const folder : {"/csrc/", "/tests/"}) {
    if (const auto at = path.rfind(folder); at != std::string::npos) return path.substr(at + 1);
  }
  return path;
}

std::string text(const Place& place) { return short_path(place.file) + ":" + std::to_string(place.line); }

}  // namespace emulator
