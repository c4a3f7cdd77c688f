// Scratch of a thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace fastft {

// Memory of this thread, kept between calls and grown where more is asked for.
class Room {
 public:
  uint32_t* words(int64_t count) {
    if (count > size_) {
      const size_t bytes = (static_cast<size_t>(count) * sizeof(uint32_t) + 63) / 64 * 64;
      held_.reset();
      size_ = 0;
      held_.reset(static_cast<uint32_t*>(std::aligned_alloc(64, bytes)));
      if (held_ == nullptr) throw std::bad_alloc();
      size_ = count;
    }
    return held_.get();
  }

 private:
  struct Free {
    void operator()(void* at) const { std::free(at); }
  };
  std::unique_ptr<uint32_t, Free> held_;
  int64_t size_ = 0;
};

}  // namespace fastft
