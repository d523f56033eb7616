// Advances an artifact by a prompt and by a token, with a system call before, between and after them as marks.
#include <unistd.h>

#include <numeric>

#include "session.h"

int main(int, char** arguments) {
  Session session(arguments[1], 1, arguments[2]);
  std::vector<int64_t> prompt(std::stoul(arguments[3]));
  std::iota(prompt.begin(), prompt.end(), 1000);
  session.advance({1});  // the first call allocates
  getppid();
  session.advance(prompt);
  getppid();
  session.advance({2});
  getppid();
  _exit(0);
}
