// Words and marks of PTX text.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace emulator::ptx {

// Walks over text; skips space and comments, counts lines.
class Cursor {
 public:
  Cursor(std::string_view text, size_t at, int32_t line) : text_(text), at_(at), line_(line) {
    skip();
  }

  bool done() const { return at_ >= text_.size(); }
  char peek() const { return done() ? '\0' : text_[at_]; }
  size_t at() const { return at_; }
  int32_t line() const { return line_; }

  char take() {
    char const c = peek();
    ++at_;
    skip();
    return c;
  }
  bool accept(char c) {
    if (peek() != c) {
      return false;
    }
    take();
    return true;
  }
  void expect(char c) {
    if (!accept(c)) {
      fail(std::string("expected '") + c + "'");
    }
  }
  // Letters, digits, _ $ % and, if dotted, dots and colons (as in cp.async.shared::cta).
  std::string_view word(bool dotted) {
    size_t const begin = at_;
    while (at_ < text_.size() && is_word(text_[at_], dotted)) {
      ++at_;
    }
    if (at_ == begin) {
      fail("expected a word");
    }
    std::string_view const result = text_.substr(begin, at_ - begin);
    skip();
    return result;
  }
  // Whether a label starts here: a name and a colon, but not two.
  bool at_label() const {
    size_t i = at_;
    while (i < text_.size() && is_word(text_[i], false)) {
      ++i;
    }
    if (i == at_) {
      return false;
    }
    while (i < text_.size() && (text_[i] == ' ' || text_[i] == '\t')) {
      ++i;
    }
    return i < text_.size() && text_[i] == ':' && (i + 1 == text_.size() || text_[i + 1] != ':');
  }
  void skip_past(char c) {
    while (!done() && peek() != c) {
      if (peek() == '"') {
        skip_string();
      } else {
        take();
      }
    }
    expect(c);
  }
  void skip_string() {
    for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) {
    }
    take();
  }
  [[noreturn]] void fail(std::string const& what) const {
    throw std::runtime_error("PTX line " + std::to_string(line_) + ": " + what + " at '" +
                             std::string(text_.substr(at_, 40)) + "'");
  }

 private:
  static bool is_word(char c, bool dotted) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
           (dotted && (c == '.' || c == ':'));
  }
  void skip() {
    while (at_ < text_.size()) {
      char const c = text_[at_];
      if (c == '\n') {
        ++line_;
        ++at_;
      } else if (c == ' ' || c == '\t' || c == '\r') {
        ++at_;
      } else if (c == '/' && at_ + 1 < text_.size() && text_[at_ + 1] == '/') {
        at_ = std::min(text_.find('\n', at_), text_.size());
      } else if (c == '/' && at_ + 1 < text_.size() && text_[at_ + 1] == '*') {
        size_t const end = std::min(text_.find("*/", at_), text_.size() - 2) + 2;
        for (; at_ < end; ++at_) {
          line_ += text_[at_] == '\n';
        }
      } else {
        return;
      }
    }
  }

  std::string_view text_;
  size_t at_;
  int32_t line_;
};

}  // namespace emulator::ptx
