# Turns a plain llama.cpp tree into the looping one, while CMake configures it:
#
#   cmake -DCMAKE_PROJECT_llama.cpp_INCLUDE=<this file> -DGGUFLOOP_PATCH_ID=<id> ...
#
# CMake includes this file right after project("llama.cpp"), before any target exists. It applies the patches to the
# source tree once, and at the end of the top directory adds llama-loop*.cpp (everything else) to the target `llama`. The
# build files of llama.cpp stay untouched, so the patches have nothing to say about CMake.
#
# With GGUFLOOP_PATCH_ID=stock the library stays without loops: it gets the mends that make it compute, and its programs
# say all they have to say, no more.

if(CMAKE_VERSION VERSION_LESS 3.21)
    message(FATAL_ERROR "ggufloop: CMake ${CMAKE_VERSION} is too old, 3.21 is needed")
endif()
if(NOT GGUFLOOP_PATCH_ID)
    message(FATAL_ERROR "ggufloop: GGUFLOOP_PATCH_ID is not set; `ggufloop build` passes it")
endif()

set(GGUFLOOP_PATCHES ${CMAKE_CURRENT_LIST_DIR})

set(GGUFLOOP_APPLIED ${GGUFLOOP_PATCHES}/ggml-amx.patch ${GGUFLOOP_PATCHES}/common-log.patch)
if(NOT GGUFLOOP_PATCH_ID STREQUAL "stock")
    list(APPEND GGUFLOOP_APPLIED ${GGUFLOOP_PATCHES}/ggml-loop.patch ${GGUFLOOP_PATCHES}/llama-loop.patch)
    if(LLAMA_BUILD_COMMON) # llama.cpp's own programs, its server among them
        list(APPEND GGUFLOOP_APPLIED ${GGUFLOOP_PATCHES}/llama-server-loop.patch)
    endif()
endif()

# One hash over the files that a patch names, so that it can be seen whether they changed. The exit code of the tool that
# applies the patch proves nothing: `git apply` inside another repository succeeds without changing a file.
function(ggufloop_hash_named patch out)
    file(STRINGS ${patch} lines REGEX "^\\+\\+\\+ b/")
    set(hashes "")
    foreach(line IN LISTS lines)
        string(REGEX REPLACE "^\\+\\+\\+ b/([^\t]+).*$" "\\1" name "${line}")
        set(hash "none")
        if(EXISTS ${CMAKE_SOURCE_DIR}/${name})
            file(SHA256 ${CMAKE_SOURCE_DIR}/${name} hash)
        endif()
        string(APPEND hashes "${hash} ")
    endforeach()
    set(${out} "${hashes}" PARENT_SCOPE)
endfunction()

function(ggufloop_apply patch)
    find_program(GGUFLOOP_GIT git)
    find_program(GGUFLOOP_PATCH patch)
    if(GGUFLOOP_GIT)
        # A repository above the tree, or one named by the environment of a git hook, must not be found.
        get_filename_component(parent ${CMAKE_SOURCE_DIR} DIRECTORY)
        set(command ${CMAKE_COMMAND} -E env --unset=GIT_DIR --unset=GIT_WORK_TREE --unset=GIT_INDEX_FILE --unset=GIT_PREFIX
            GIT_CEILING_DIRECTORIES=${parent} ${GGUFLOOP_GIT} -c core.autocrlf=false apply --whitespace=nowarn ${patch})
    elseif(GGUFLOOP_PATCH)
        set(command ${GGUFLOOP_PATCH} -p1 --batch --forward --fuzz=0 -i ${patch})
    else()
        message(FATAL_ERROR "ggufloop: neither git nor patch is here to apply ${patch}")
    endif()
    ggufloop_hash_named(${patch} before)
    execute_process(COMMAND ${command} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR}
        RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
    ggufloop_hash_named(${patch} after)
    if(NOT result EQUAL 0 OR before STREQUAL after)
        get_filename_component(name ${patch} NAME)
        message(FATAL_ERROR "ggufloop: ${name} does not apply to this llama.cpp: ${output}")
    endif()
endfunction()

# All of them, once: a stamp in the tree says which.
function(ggufloop_apply_patches)
    set(stamp ${CMAKE_SOURCE_DIR}/.ggufloop-patches)
    set(wanted "")
    foreach(patch IN LISTS GGUFLOOP_APPLIED)
        file(SHA256 ${patch} hash)
        string(APPEND wanted "${hash} ")
    endforeach()

    if(EXISTS ${stamp})
        file(READ ${stamp} applied)
        if(NOT applied STREQUAL wanted)
            message(FATAL_ERROR "ggufloop: ${CMAKE_SOURCE_DIR} was patched with ${applied}, not with ${wanted}; start from a fresh tree")
        endif()
        return()
    endif()

    foreach(patch IN LISTS GGUFLOOP_APPLIED)
        ggufloop_apply(${patch})
    endforeach()
    file(WRITE ${stamp} ${wanted})
    message(STATUS "ggufloop: patch ${GGUFLOOP_PATCH_ID} applied")
endfunction()

function(ggufloop_add_sources)
    file(GLOB sources ${GGUFLOOP_PATCHES}/llama-loop*.cpp)
    target_sources(llama PRIVATE ${sources})
    # public, because llama.cpp's own programs and tests include the headers that the patch has changed
    target_include_directories(llama PUBLIC ${GGUFLOOP_PATCHES})
    # llama.cpp compiles its sources in unity batches, where file-local names of different files meet.
    # Source properties belong to a directory: without TARGET_DIRECTORY they would be set where nothing reads them.
    set_source_files_properties(${sources} TARGET_DIRECTORY llama PROPERTIES
        SKIP_UNITY_BUILD_INCLUSION ON
        COMPILE_DEFINITIONS "GGUFLOOP_PATCH_ID=\"${GGUFLOOP_PATCH_ID}\"")
endfunction()

ggufloop_apply_patches()
if(NOT GGUFLOOP_PATCH_ID STREQUAL "stock")
    cmake_language(DEFER CALL ggufloop_add_sources)
endif()
