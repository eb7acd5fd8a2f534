#include <gtest/gtest.h>
#include <stdio.h>

#include <cstdio>

#include "cli/commands.h"
#include "cli/print/print.h"

namespace orlop::cli {
namespace {

TEST(Completion, BashTakesTheScriptAndCompletesSubcommands) {
  testing::internal::CaptureStdout();
  EXPECT_EQ(Completion("bash"), kOk);
  const std::string script = testing::internal::GetCapturedStdout() +
                             "COMP_WORDS=(orlop de); COMP_CWORD=1; _orlop; echo ${COMPREPLY[@]}\n";
  const std::string path = testing::TempDir() + "/orlop_completion_test.sh";
  FILE* file = std::fopen(path.c_str(), "w");
  ASSERT_NE(file, nullptr);
  ASSERT_EQ(std::fwrite(script.data(), 1, script.size(), file), script.size());
  std::fclose(file);
  FILE* bash = popen(("bash " + path + " 2>&1").c_str(), "r");
  ASSERT_NE(bash, nullptr);
  char answer[256] = "";
  EXPECT_NE(std::fgets(answer, sizeof answer, bash), nullptr);
  EXPECT_EQ(pclose(bash), 0);
  std::remove(path.c_str());
  EXPECT_STREQ(answer, "describe delete\n");
}

}  // namespace
}  // namespace orlop::cli
