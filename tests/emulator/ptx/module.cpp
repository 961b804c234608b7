#include "module.h"

#include "body.h"
#include "declarations.h"

namespace emulator::ptx {
namespace {

// The end of a block, past its closing brace. No brace is inside a string in PTX of nvcc.
size_t end_of_block(std::string_view text, size_t at) {
  int depth = 0;
  for (; at < text.size(); ++at) {
    if (text[at] == '/' && at + 1 < text.size() && text[at + 1] == '/') {
      at = std::min(text.find('\n', at), text.size());
    } else if (text[at] == '{') {
      ++depth;
    } else if (text[at] == '}' && --depth == 0) {
      return at + 1;
    }
  }
  throw std::runtime_error("PTX ends inside a block");
}

}  // namespace

Text::Text(std::string text) : text_(std::move(text)) {
  Cursor cursor(text_, 0, 1);
  bool external = false;
  while (!cursor.done()) {
    size_t const begin = cursor.at();
    int32_t const line = cursor.line();
    std::string_view const word = cursor.word(true);
    if (word == ".visible" || word == ".weak" || word == ".extern" || word == ".common") {
      external |= word == ".extern";
      continue;
    }
    if (word == ".version" || word == ".address_size") {
      cursor.word(true);
    } else if (word == ".target") {
      do {
        cursor.word(true);
      } while (cursor.accept(','));
    } else if (word == ".entry") {
      std::string const name(cursor.word(false));
      size_t const end = end_of_block(text_, cursor.at());
      kernels_.emplace(name, Span{begin, end, line});
      int32_t lines = line;
      for (size_t i = begin; i < end; ++i) {
        lines += text_[i] == '\n';
      }
      cursor = Cursor(text_, end, lines);
    } else if (word == ".file") {
      cursor.word(false);
      cursor.skip_string();
    } else if (word == ".global" || word == ".const" || word == ".shared") {
      variables_.push_back(read_variable(cursor, word, external));
      cursor.expect(';');
    } else if (word == ".section") {
      break;  // debug data, which comes last
    } else {
      cursor.fail("unknown directive " + std::string(word));
    }
    external = false;
  }
}

std::vector<std::string> Text::kernels() const {
  std::vector<std::string> result;
  for (auto const& [name, span] : kernels_) {
    result.push_back(name);
  }
  return result;
}

Kernel Text::parse(std::string const& kernel) const {
  auto const found = kernels_.find(kernel);
  if (found == kernels_.end()) {
    throw std::runtime_error("the module has no kernel " + kernel);
  }
  Span const& span = found->second;
  return parse_kernel(std::string_view(text_).substr(0, span.end), span.begin, span.line);
}

}  // namespace emulator::ptx
