#include "declarations.h"

#include <cstring>

namespace emulator::ptx {

uint32_t bytes_of_type(std::string_view type, Cursor const& where) {
  std::string_view const digits = type.substr(std::min<size_t>(2, type.size()));
  if (digits == "8") {
    return 1;
  }
  if (digits == "16") {
    return 2;
  }
  if (digits == "32") {
    return 4;
  }
  if (digits == "64") {
    return 8;
  }
  if (digits == "128") {
    return 16;
  }
  if (type == ".pred") {
    return 1;
  }
  where.fail("unknown type " + std::string(type));
}

uint64_t read_integer(Cursor& cursor) {
  bool const negative = cursor.accept('-');
  std::string word(cursor.word(false));
  while (!word.empty() && (word.back() == 'U' || word.back() == 'u')) {
    word.pop_back();
  }
  size_t used = 0;
  uint64_t value = 0;
  // 0f and 0d give the bits of a float; 0b is binary; the rest is decimal, hexadecimal or octal.
  if (word.size() > 2 && word[0] == '0' && std::strchr("fFdD", word[1])) {
    value = std::stoull(word.substr(2), &used, 16);
    used += 2;
    if (negative) {
      value ^= (word[1] | 32) == 'f' ? 1ull << 31 : 1ull << 63;
    }
    return value;
  }
  if (word.size() > 2 && word[0] == '0' && (word[1] | 32) == 'b') {
    value = std::stoull(word.substr(2), &used, 2);
    used += 2;
  } else {
    value = std::stoull(word, &used, 0);
  }
  if (used != word.size()) {
    cursor.fail("cannot read the number " + word);
  }
  return negative ? -value : value;
}

namespace {

Variable::Space space_of(std::string_view name, Cursor const& where) {
  if (name == ".shared") {
    return Variable::Space::kShared;
  }
  if (name == ".local") {
    return Variable::Space::kLocal;
  }
  if (name == ".global") {
    return Variable::Space::kGlobal;
  }
  if (name == ".const") {
    return Variable::Space::kConst;
  }
  if (name == ".param") {
    return Variable::Space::kParam;
  }
  where.fail("unknown state space " + std::string(name));
}

}  // namespace

Variable read_variable(Cursor& cursor, std::string_view space, bool external) {
  Variable result;
  result.space = space_of(space, cursor);
  uint32_t element = 0;
  while (cursor.peek() == '.') {
    std::string_view const word = cursor.word(true);
    if (word == ".align") {
      result.align = static_cast<uint32_t>(read_integer(cursor));
    } else if (word == ".ptr") {  // what a parameter points to says nothing of its own size
      while (cursor.peek() == '.') {
        if (cursor.word(true) == ".align") {
          read_integer(cursor);
        }
      }
    } else {
      element = bytes_of_type(word, cursor);
    }
  }
  result.align = std::max(result.align, element);
  result.name = std::string(cursor.word(false));
  result.bytes = element;
  while (cursor.accept('[')) {
    if (cursor.peek() == ']') {
      result.dynamic = external;
      result.bytes = 0;
    } else {
      result.bytes *= read_integer(cursor);
    }
    cursor.expect(']');
  }
  if (cursor.accept('=')) {
    bool const braces = cursor.accept('{');
    do {
      uint64_t const value = read_integer(cursor);
      auto const* const bytes = reinterpret_cast<uint8_t const*>(&value);
      result.values.insert(result.values.end(), bytes, bytes + std::min<uint32_t>(element, 8));
    } while (braces && cursor.accept(','));
    if (braces) {
      cursor.expect('}');
    }
    result.bytes = std::max<uint64_t>(result.bytes, result.values.size());
  }
  return result;
}

}  // namespace emulator::ptx
