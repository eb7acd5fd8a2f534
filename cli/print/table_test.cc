#include "cli/print/table.h"

#include <gtest/gtest.h>

#include <cstdint>

namespace orlop::cli {
namespace {

TEST(Table, AlignsColumnsAndLeavesNoTrailingBlanks) {
  Table table({{"NAME"}, {"BYTES", Align::kRight}, {"NOTE"}});
  table.AddRow({"a", "7", ""});
  table.AddRow({"größe", "1000", "x"});
  EXPECT_EQ(table.Render(),
            "NAME   BYTES  NOTE\n"
            "a          7\n"
            "größe   1000  x\n");
}

TEST(Table, FillsMissingCellsAndDropsExtraOnes) {
  Table table({{"A"}, {"B"}});
  table.AddRow({"1"});
  table.AddRow({"1", "2", "3"});
  EXPECT_EQ(table.Render(), "A  B\n1\n1  2\n");
}

TEST(Table, LeavesOutColumnsInWhichNothingStands) {
  Table table({{"A"}, {"EMPTY"}, {"B", Align::kRight}});
  table.AddRow({"1", "", "2"});
  EXPECT_EQ(table.Render(), "A  B\n1  2\n");
}

TEST(Plural, AddsAnS) {
  EXPECT_EQ(Plural(1, "shard"), "1 shard");
  EXPECT_EQ(Plural(0, "shard"), "0 shards");
}

TEST(HumanUnits, ChangeUnitWhereTheRoundedValueWould) {
  EXPECT_EQ(HumanBytes(0), "0 B");
  EXPECT_EQ(HumanBytes(1023), "1023 B");
  EXPECT_EQ(HumanBytes(1024), "1.0 KiB");
  EXPECT_EQ(HumanBytes((1 << 20) - 1), "1.0 MiB");
  EXPECT_EQ(HumanBytes(uint64_t{3} << 29), "1.5 GiB");
  EXPECT_EQ(HumanCount(999), "999");
  EXPECT_EQ(HumanCount(10'700'000), "10.7 M");
  EXPECT_EQ(HumanSeconds(0.0012), "1.2 ms");
  EXPECT_EQ(HumanSeconds(245), "4 m 05 s");
  EXPECT_EQ(HumanSeconds(7384), "2 h 03 m");
}

TEST(Bar, IsFullAtTheLimitAndBeyondIt) {
  EXPECT_EQ(Bar(1, 2, 4, false), "##..");
  EXPECT_EQ(Bar(9, 2, 4, false), "####");
  EXPECT_EQ(Bar(0, 0, 4, false), "....");
  EXPECT_EQ(Bar(1, 1, 2, true), "██");
}

}  // namespace
}  // namespace orlop::cli
