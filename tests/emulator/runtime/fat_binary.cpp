#include <cstring>

#include "kernels.h"

namespace emulator {
namespace {

// What nvcc embeds in an object file, as far as it is needed here.
struct Wrapper {
  int32_t magic;
  int32_t version;
  char const* data;
  void* file;
};

struct Header {
  uint32_t magic;
  uint16_t version;
  uint16_t header_bytes;
  uint64_t bytes;  // after the header
};

struct Image {
  uint16_t kind;
  uint16_t version;
  uint32_t header_bytes;
  uint64_t bytes;             // after the header
  uint32_t compressed_bytes;  // 0 if it is not compressed
  uint32_t unused;
  uint16_t minor;
  uint16_t major;
  uint32_t arch;
};

constexpr int32_t kWrapperMagic = 0x466243b1;
constexpr uint32_t kHeaderMagic = 0xba55ed50;
constexpr uint16_t kPtx = 1;

template <class T>
T read(char const* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

}  // namespace

std::string ptx_of(void const* fat_binary) {
  Wrapper const wrapper = read<Wrapper>(static_cast<char const*>(fat_binary));
  if (wrapper.magic != kWrapperMagic) {
    throw Error("emulator: a library registered something that is no fat binary");
  }
  Header const header = read<Header>(wrapper.data);
  if (header.magic != kHeaderMagic) {
    throw Error("emulator: a fat binary has an unknown header");
  }
  char const* at = wrapper.data + header.header_bytes;
  char const* const end = at + header.bytes;
  std::string found;
  uint32_t arch = 0;
  while (at + sizeof(Image) <= end) {
    Image const image = read<Image>(at);
    char const* const content = at + image.header_bytes;
    if (image.kind == kPtx && image.arch > arch) {
      if (image.compressed_bytes != 0) {
        throw Error("emulator: PTX is compressed; compile with --compress-mode=none");
      }
      found.assign(content, image.bytes);
      arch = image.arch;
    }
    at = content + image.bytes;
  }
  if (found.empty()) {
    throw Error("emulator: a fat binary has no PTX; compile with code=compute_XX");
  }
  found.resize(std::strlen(found.c_str()));  // less the zeros that fill it up
  return found;
}

}  // namespace emulator
