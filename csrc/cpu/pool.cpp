// A training step asks for the same sizes in the same order again and again. The C library either
// cuts its heap into pieces that no longer fit (a third more is resident than is alive), or maps
// and unmaps each block, at a page fault for every 4 KiB. Here a block that comes back waits for
// the next request of its size.
//
// What is held never exceeds the most that was ever alive by more than an eighth: where a new size
// would, the blocks idle for longest are returned to the system.
#include "pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <iterator>
#include <list>
#include <map>
#include <mutex>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace fastft {
namespace {

constexpr size_t kGrain = size_t{1} << 16;  // sizes are multiples of this
constexpr int kMaxDims = 8;

struct Idle {
  size_t size;
  void* data;
};

class Pool {
 public:
  // A block of at least `bytes`, whose size is written to `size`; null: no memory.
  void* take(size_t bytes, size_t* size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t wanted = (bytes + kGrain - 1) / kGrain * kGrain;
    // The smallest idle block that is not an eighth too large.
    auto found = by_size_.lower_bound(wanted);
    if (found != by_size_.end() && found->first <= wanted + wanted / 8) {
      const auto place = found->second.back();
      found->second.pop_back();
      if (found->second.empty()) by_size_.erase(found);
      const Idle idle = *place;
      idle_.erase(place);
      count(idle.size);
      *size = idle.size;
      return idle.data;
    }
    const size_t before = peak_;
    count(wanted);
    while (!idle_.empty() && mapped_ + wanted > peak_ + peak_ / 8) drop_oldest();
    void* data = map(wanted);
    while (data == nullptr && !idle_.empty()) {
      drop_oldest();
      data = map(wanted);
    }
    if (data == nullptr) {
      live_ -= wanted;
      peak_ = before;
      return nullptr;
    }
    mapped_ += wanted;
    *size = wanted;
    return data;
  }

  void give(void* data, size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    live_ -= size;
    idle_.push_back({size, data});
    by_size_[size].push_back(std::prev(idle_.end()));
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  PoolStats stats() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {live_, peak_, mapped_};
  }

  void trim() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!idle_.empty()) drop_oldest();
    peak_ = live_;
  }

 private:
  void count(size_t size) {
    live_ += size;
    if (live_ > peak_) peak_ = live_;
  }

  static void* map(size_t size) {
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return data == MAP_FAILED ? nullptr : data;
  }

  void drop_oldest() {
    const Idle idle = idle_.front();
    auto found = by_size_.find(idle.size);
    // The oldest of its size is the first one there.
    found->second.pop_front();
    if (found->second.empty()) by_size_.erase(found);
    idle_.pop_front();
    munmap(idle.data, idle.size);
    mapped_ -= idle.size;
  }

  std::mutex mutex_;
  std::list<Idle> idle_;  // the longest idle first
  std::map<size_t, std::list<std::list<Idle>::iterator>> by_size_;
  size_t live_ = 0, peak_ = 0, mapped_ = 0;
};

Pool& pool();

// A child is forked between two of the pool's calls, never within one of another thread.
void before_fork() { pool().lock(); }
void after_fork() { pool().unlock(); }

// Never destroyed: tensors may outlive everything else in the process.
Pool& pool() {
  static Pool* const only = [] {
    pthread_atfork(before_fork, after_fork, after_fork);
    return new Pool;
  }();
  return *only;
}

struct Loan {
  dlpack::ManagedTensor managed;
  int64_t shape[kMaxDims], strides[kMaxDims];
  size_t size;
};

void give_back(dlpack::ManagedTensor* managed) {
  Loan* loan = static_cast<Loan*>(managed->manager);
  pool().give(managed->tensor.data, loan->size);
  delete loan;
}

}  // namespace

dlpack::ManagedTensor* pool_tensor(const int64_t* shape, const int64_t* strides, int ndim,
                                   dlpack::DataType dtype) {
  if (ndim > kMaxDims) return nullptr;
  Loan* loan = new Loan;
  size_t bytes = dtype.bits / 8;
  for (int i = 0; i < ndim; ++i) {
    loan->shape[i] = shape[i];
    loan->strides[i] = strides[i];
    bytes *= static_cast<size_t>(shape[i]);
  }
  void* data = pool().take(bytes, &loan->size);
  if (data == nullptr) {
    delete loan;
    return nullptr;
  }
  loan->managed.tensor = {data, {1, 0}, ndim, dtype, loan->shape, loan->strides, 0};
  loan->managed.manager = loan;
  loan->managed.deleter = give_back;
  return &loan->managed;
}

PoolStats pool_stats() { return pool().stats(); }

void pool_trim() {
  pool().trim();
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

}  // namespace fastft
