# Removes the files that the last `cmake --install` of a build directory installed. The target `uninstall` runs this script with `cmake -P`
# in the build directory, which is then CMAKE_BINARY_DIR. DESTDIR in the environment must be that of the installation. Directories stay.
set(manifest ${CMAKE_BINARY_DIR}/install_manifest.txt)
if(NOT EXISTS ${manifest})
  message(FATAL_ERROR "nothing to uninstall: ${manifest} does not exist")
endif()
file(STRINGS ${manifest} files)
foreach(file ${files})
  message(STATUS "removing $ENV{DESTDIR}${file}")
  file(REMOVE "$ENV{DESTDIR}${file}")
endforeach()
