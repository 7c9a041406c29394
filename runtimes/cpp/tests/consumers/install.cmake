# Installs the build and moves the tree: what the consumers find must not depend on where it was installed.
#   cmake -DBUILD=... -DTO=... -P install.cmake
file(REMOVE_RECURSE ${TO} ${TO}.first)
execute_process(COMMAND ${CMAKE_COMMAND} --install ${BUILD} --prefix ${TO}.first COMMAND_ERROR_IS_FATAL ANY OUTPUT_QUIET)
file(RENAME ${TO}.first ${TO})
file(GLOB_RECURSE files ${TO}/*.cmake ${TO}/*.pc)
foreach(file ${files})
  file(READ ${file} text)
  if(text MATCHES "onnxruntime|nlohmann" OR text MATCHES "${TO}.first")
    message(FATAL_ERROR "${file} needs the headers of the build, or names the folder it was installed to")
  endif()
endforeach()
