# Every optimizer of kernels/optimizers/: NAME.h has the rule of struct Name. This is its registration.
set(ORLOP_OPTIMIZERS
  adamw
  adam
  adamw_bnb
  sgd
  lion
  adagrad
  rmsprop
  rmsprop_full
  ademamix)

# Compiles each of them as one file of `target`, made of optimizer_unit.cc.in.
function(orlop_add_optimizers target)
  set(out ${PROJECT_BINARY_DIR}/generated/kernels)
  foreach(ORLOP_NAME ${ORLOP_OPTIMIZERS})
    string(REPLACE "_" ";" words ${ORLOP_NAME})
    set(ORLOP_STRUCT "")
    foreach(word ${words})
      string(SUBSTRING ${word} 0 1 first)
      string(SUBSTRING ${word} 1 -1 rest)
      string(TOUPPER ${first} first)
      string(APPEND ORLOP_STRUCT ${first}${rest})
    endforeach()
    set(ORLOP_FILE ${out}/${ORLOP_NAME}.cc)
    configure_file(${PROJECT_SOURCE_DIR}/kernels/optimizer_unit.cc.in ${ORLOP_FILE} @ONLY)
    target_sources(${target} PRIVATE ${ORLOP_FILE})
    string(APPEND list "ORLOP_OPTIMIZER(${ORLOP_STRUCT})\n")
  endforeach()
  file(CONFIGURE OUTPUT ${out}/optimizers.inc CONTENT "${list}")
  target_include_directories(${target} PRIVATE ${PROJECT_BINARY_DIR}/generated)
endfunction()
