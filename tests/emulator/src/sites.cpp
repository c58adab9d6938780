#include "emulator/sites.h"

#include <array>
#include <cstring>
#include <deque>
#include <string>

#include "emulator/machine.h"

namespace emulator {
namespace {

std::deque<Site> sites;  // addresses stay valid

// Sites are looked up at every use, by the address of the file's name and the line. Two lines that share a slot take
// turns in it.
struct Cached {
  const char* kind = nullptr;
  const char* file = nullptr;
  int line = 0;
  Site* site = nullptr;
};
std::array<Cached, 1024> cache;

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

bool is_named(const Site& site) {
  for (const SiteName& name : machine.settings.dropped) {
    if (name.line == site.place.line && name.kind == site.kind && ends_with(site.place.file, name.file)) return true;
  }
  return false;
}

Site& find(const char* kind, const Place& place) {
  for (Site& site : sites) {
    const bool same_line = site.place.line == place.line && site.kind == kind;
    if (same_line && std::strcmp(site.place.file, place.file) == 0) return site;
  }
  sites.push_back({kind, place, 0, false});
  sites.back().dropped = is_named(sites.back());
  return sites.back();
}

}  // namespace

bool is_dropped(const char* kind, const Place& place) {
  Cached& entry = cache[(reinterpret_cast<uintptr_t>(place.file) / 8 + place.line) % cache.size()];
  if (entry.file != place.file || entry.line != place.line || entry.kind != kind) {
    entry = {kind, place.file, place.line, &find(kind, place)};
  }
  ++entry.site->count;
  return entry.site->dropped;
}

void reset_sites() {
  for (Site& site : sites) {
    site.count = 0;
    site.dropped = is_named(site);
  }
}

std::vector<Site> used_sites() {
  std::vector<Site> used;
  for (const Site& site : sites) {
    if (site.count > 0) used.push_back(site);
  }
  return used;
}

}  // namespace emulator
