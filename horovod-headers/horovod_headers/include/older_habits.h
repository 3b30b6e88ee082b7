// What Horovod 0.28.1 takes for granted and newer compilers no longer give. Included before each of its files.
#pragma once

// g++ 13 and later include these in fewer of their own headers.
#include <cstddef>
#include <stdexcept>
#include <string>

// g++ 14 refuses the assignment in the `span` of the FlatBuffers that Horovod brings, which Horovod never uses.
// FlatBuffers takes the standard library's instead; before C++20 there is none, so here is as much as it names.
#define FLATBUFFERS_USE_STD_SPAN
#if __cplusplus < 202002L
namespace std {
inline constexpr size_t dynamic_extent = static_cast<size_t>(-1);
template <class T, size_t Extent = dynamic_extent>
class span {
 public:
  constexpr span(T* first, size_t count) noexcept : data_(first), size_(count) {}
  constexpr T* data() const noexcept { return data_; }
  constexpr size_t size() const noexcept { return size_; }

 private:
  T* data_;
  size_t size_;
};
}  // namespace std
#endif
