#include "common/file_reads.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <string>
#include <utility>

namespace hmi {
namespace {

constexpr std::chrono::seconds kLongRead{1};
constexpr double kForeverSeconds = 1e9;  // the clock can still count them

double seconds_of(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

}  // namespace

FileReads::FileReads(std::vector<FileRead> reads, bool check_finite, int num_threads)
    : reads_(std::move(reads)),
      check_finite_(check_finite),
      num_threads_(static_cast<size_t>(std::max(num_threads, 0))),
      process_(getpid()),
      started_(Clock::now()),
      progress_(reads_.size()),
      num_left_(reads_.size()),
      last_end_(started_) {
  if (num_threads < 1) {
    throw std::invalid_argument("num_threads must be positive, not " + std::to_string(num_threads));
  }
  for (const FileRead& read : reads_) read.check();
  under_way_.reserve(reads_.size());  // so that read_on() cannot fail
}

bool FileReads::has_places_for(size_t num_threads) const {
  if (num_threads <= num_threads_) return true;
  const Clock::time_point limit = Clock::now() - kLongRead;
  const auto num_long = std::count_if(under_way_.begin(), under_way_.end(),
                                      [&](const UnderWay& each) { return each.began < limit; });
  return num_threads - static_cast<size_t>(num_long) <= num_threads_;
}

bool FileReads::may_join() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_begun_ < reads_.size() && has_places_for(num_joined_ + 1);
}

bool FileReads::join() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool has_joined = num_begun_ < reads_.size() && has_places_for(num_joined_ + 1);
  num_joined_ += has_joined;
  return has_joined;
}

void FileReads::read_on() noexcept {
  std::unique_lock<std::mutex> lock(mutex_);
  // A thread whose read was stuck, and now is not, may have lost its place to another.
  while (num_begun_ < reads_.size() && has_places_for(num_joined_)) {
    const size_t number = num_begun_++;
    const Clock::time_point began = Clock::now();
    progress_[number].stage = ReadStage::kUnderWay;
    under_way_.push_back({number, began});
    lock.unlock();
    const FileReadOutcome outcome = read_file(reads_[number], check_finite_);
    lock.lock();
    under_way_.erase(std::find_if(under_way_.begin(), under_way_.end(),
                                  [&](const UnderWay& each) { return each.number == number; }));
    end(number, outcome, began);
  }
  --num_joined_;
}

void FileReads::end(size_t number, const FileReadOutcome& outcome, Clock::time_point began) {
  last_end_ = Clock::now();
  progress_[number] = {ReadStage::kEnded, outcome, seconds_of(last_end_ - began)};
  if (--num_left_ == 0) done_.notify_all();
}

bool FileReads::all_begun() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_begun_ == reads_.size();
}

void FileReads::cancel() {
  if (!is_of_this_process()) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  FileReadOutcome canceled;
  canceled.error = ECANCELED;
  while (num_begun_ < reads_.size()) end(num_begun_++, canceled, Clock::now());
}

bool FileReads::wait(double seconds) const {
  require_this_process();
  std::unique_lock<std::mutex> lock(mutex_);
  const auto is_done = [&] { return num_left_ == 0; };
  if (seconds < kForeverSeconds) return done_.wait_for(lock, std::chrono::duration<double>(seconds), is_done);
  done_.wait(lock, is_done);
  return true;
}

bool FileReads::is_done() const {
  if (!is_of_this_process()) return true;
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_left_ == 0;
}

std::vector<ReadProgress> FileReads::progress() const {
  require_this_process();
  const std::lock_guard<std::mutex> lock(mutex_);
  return progress_;
}

double FileReads::seconds() const {
  require_this_process();
  const std::lock_guard<std::mutex> lock(mutex_);
  return seconds_of(last_end_ - started_);
}

bool FileReads::is_of_this_process() const { return getpid() == process_; }

void FileReads::require_this_process() const {
  if (!is_of_this_process()) {
    throw std::runtime_error("these reads were started before fork() and go on in the parent; start them anew here");
  }
}

}  // namespace hmi
