# cmake --install installs orlopd, orlop, and the C++ client for other projects: find_package(orlop), link orlop::client.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

if(SKBUILD)  # a Python wheel has only the binaries and the extension (python/CMakeLists.txt)
  return()
endif()

if(NOT TARGET orlopd OR NOT TARGET orlop)
  return()
endif()
install(TARGETS orlopd orlop RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(TARGETS orlop_base orlop_proto orlop_client_link orlop_client_lanes orlop_client EXPORT orlopTargets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
foreach(folder base proto client)
  install(DIRECTORY ${PROJECT_SOURCE_DIR}/${folder}/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/orlop/${folder}
          FILES_MATCHING PATTERN "*.h" PATTERN "*.proto")
endforeach()
install(DIRECTORY ${PROJECT_BINARY_DIR}/generated/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/orlop
        FILES_MATCHING PATTERN "*.h")
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/orlop)
install(EXPORT orlopTargets NAMESPACE orlop:: DESTINATION ${package})
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/orlopConfig.cmake.in ${PROJECT_BINARY_DIR}/orlopConfig.cmake
                              INSTALL_DESTINATION ${package})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/orlopConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/orlopConfig.cmake ${PROJECT_BINARY_DIR}/orlopConfigVersion.cmake
        DESTINATION ${package})

add_custom_target(uninstall
  COMMAND ${CMAKE_COMMAND} -P ${CMAKE_CURRENT_LIST_DIR}/uninstall.cmake
  COMMENT "Remove the files listed in install_manifest.txt")
