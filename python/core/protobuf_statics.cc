// Keeps libprotobuf apart from another version of it in the same process: grpc_tools' compiler
// carries one and exports it.
//
// The statics inside inline functions are STB_GNU_UNIQUE: a library that is loaded later uses those
// of the first library, even if both are private. The versions disagree about their types: protobuf
// 3.21 ends ShutdownData in a std::mutex (40 bytes), newer ones in an absl::Mutex (8). After
// `import grpc_tools.protoc`, loading libprotobuf 3.21 locked a mutex outside its allocation
// ("Invalid argument", abort). libprotobuf searches the extension for symbols before its own
// dependencies, and ordinary definitions are not shared. So the extension defines these statics.
#include <google/protobuf/stubs/common.h>

#include <cstdint>

#if GOOGLE_PROTOBUF_VERSION / 1000 == 3021
#define ORLOP_OWN_STATIC(name, symbol)                                                 \
  extern "C" __attribute__((visibility("default"))) uint64_t orlop_##name asm(symbol); \
  uint64_t orlop_##name = 0

ORLOP_OWN_STATIC(shutdown_data,
                 "_ZZN6google8protobuf8internal12ShutdownData3getEvE4data");  // a pointer
ORLOP_OWN_STATIC(shutdown_data_guard, "_ZGVZN6google8protobuf8internal12ShutdownData3getEvE4data");
ORLOP_OWN_STATIC(empty_tables,
                 "_ZZN6google8protobuf20FileDescriptorTables16GetEmptyInstanceEvE22file_descriptor_"
                 "tables");  // a pointer
ORLOP_OWN_STATIC(
    empty_tables_guard,
    "_ZGVZN6google8protobuf20FileDescriptorTables16GetEmptyInstanceEvE22file_descriptor_tables");
ORLOP_OWN_STATIC(null_symbol, "_ZZN6google8protobuf6SymbolC4EvE11null_symbol");  // one byte, zero
#endif
