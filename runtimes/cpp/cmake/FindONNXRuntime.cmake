# Finds the headers of ONNX Runtime, and its library where there is one to test with.
#
#   ONNXRUNTIME_INCLUDE_DIR   folder of onnxruntime_cxx_api.h; may be set by the user
#   ONNXRUNTIME_LIBRARY       the shared library, or NOTFOUND; may be set by the user. Nothing is linked to it
#   ONNXRuntime_VERSION       "1.N" of the headers
#   onnxruntime::headers      interface target with the include folder
#
# ONNXRuntime_ROOT, as a variable of CMake or of the environment, names the top folder of a layout that is not in the
# system's place:
#
#   layout            headers                              library
#   release archive   include/                             lib/libonnxruntime.so
#   vcpkg             include/onnxruntime/                 lib/libonnxruntime.so
#   install of a      include/onnxruntime/core/session/    lib/libonnxruntime.so
#     source build
#   Debian            include/onnxruntime/                 lib/TRIPLET/libonnxruntime.so.1.N.0
#   Python wheel      none                                 onnxruntime/capi/libonnxruntime.so.1.N.P, the first python3's

find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_cxx_api.h
  PATH_SUFFIXES onnxruntime onnxruntime/core/session include include/onnxruntime include/onnxruntime/core/session
  DOC "Folder of onnxruntime_cxx_api.h")
find_library(ONNXRUNTIME_LIBRARY onnxruntime DOC "Shared library of ONNX Runtime, for the tests")
if(NOT ONNXRUNTIME_LIBRARY)
  # Neither Debian's package of the library alone nor the wheel has the name without a version.
  find_program(ONNXRUNTIME_PYTHON NAMES python3 python DOC "Python with the package onnxruntime")
  if(ONNXRUNTIME_PYTHON)
    execute_process(COMMAND ${ONNXRUNTIME_PYTHON} -c
        "import importlib.util as u; print(u.find_spec('onnxruntime').submodule_search_locations[0])"
      OUTPUT_VARIABLE _package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  foreach(_folder ${ONNXRuntime_ROOT}/lib ${ONNXRuntime_ROOT}/lib/${CMAKE_LIBRARY_ARCHITECTURE} ${_package}/capi
      /usr/lib/${CMAKE_LIBRARY_ARCHITECTURE})
    file(GLOB _found ${_folder}/libonnxruntime.so.1*)
    if(_found AND NOT ONNXRUNTIME_LIBRARY)
      list(GET _found 0 _first)
      set_property(CACHE ONNXRUNTIME_LIBRARY PROPERTY VALUE ${_first})
    endif()
  endforeach()
endif()

if(ONNXRUNTIME_INCLUDE_DIR)
  file(STRINGS ${ONNXRUNTIME_INCLUDE_DIR}/onnxruntime_c_api.h _line REGEX "^#define ORT_API_VERSION [0-9]+$")
  string(REGEX REPLACE "[^0-9]*([0-9]+)" "1.\\1" ONNXRuntime_VERSION "${_line}")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ONNXRuntime REQUIRED_VARS ONNXRUNTIME_INCLUDE_DIR VERSION_VAR ONNXRuntime_VERSION
  REASON_FAILURE_MESSAGE "set ONNXRUNTIME_INCLUDE_DIR to the folder of onnxruntime_cxx_api.h. On Debian, cmake/fetch_onnxruntime_headers.sh fetches and prints one.")
mark_as_advanced(ONNXRUNTIME_INCLUDE_DIR ONNXRUNTIME_LIBRARY ONNXRUNTIME_PYTHON)

if(ONNXRuntime_FOUND AND NOT TARGET onnxruntime::headers)
  add_library(onnxruntime::headers INTERFACE IMPORTED)
  target_include_directories(onnxruntime::headers SYSTEM INTERFACE ${ONNXRUNTIME_INCLUDE_DIR})
endif()
