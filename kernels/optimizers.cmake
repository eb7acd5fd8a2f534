# Every optimizer of kernels/optimizers/: NAME.h has the rule of struct Name. Adding NAME to this list registers it.
set(ORLOP_OPTIMIZERS
  adamw
  adam
  adamw_bnb
  sgd
  lion
  adagrad
  rmsprop
  rmsprop_full
  ademamix
  lamb
  adafactor
  muon
  store)

# Compiles each optimizer as one file of `target`, made from `template`: optimizer_unit.cc.in, or the .cu.in of kernels/cuda.
function(orlop_add_optimizers target template)
  set(out ${PROJECT_BINARY_DIR}/generated/kernels)
  string(REGEX MATCH "[a-z]+.in$" extension ${template})
  string(REPLACE ".in" "" extension ${extension})
  set(rules "#include \"kernels/optimizers/lerp.h\"\n")
  foreach(ORLOP_NAME ${ORLOP_OPTIMIZERS})
    string(REPLACE "_" ";" words ${ORLOP_NAME})
    set(ORLOP_STRUCT "")
    foreach(word ${words})
      string(SUBSTRING ${word} 0 1 first)
      string(SUBSTRING ${word} 1 -1 rest)
      string(TOUPPER ${first} first)
      string(APPEND ORLOP_STRUCT ${first}${rest})
    endforeach()
    set(ORLOP_FILE ${out}/${ORLOP_NAME}.${extension})
    configure_file(${PROJECT_SOURCE_DIR}/${template} ${ORLOP_FILE} @ONLY)
    target_sources(${target} PRIVATE ${ORLOP_FILE})
    string(APPEND list "ORLOP_OPTIMIZER(${ORLOP_STRUCT})\n")
    string(APPEND rules "#include \"kernels/optimizers/${ORLOP_NAME}.h\"\n")
  endforeach()
  file(CONFIGURE OUTPUT ${out}/optimizers.inc CONTENT "${list}")
  file(CONFIGURE OUTPUT ${out}/optimizer_rules.inc CONTENT "${rules}")
  target_include_directories(${target} PUBLIC $<BUILD_INTERFACE:${PROJECT_BINARY_DIR}/generated>)
endfunction()
