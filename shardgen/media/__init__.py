"""Media: found or fetched, probed, and decoded to the pixels of a window.

errors      FetchError and MediaError, each with a stable reason code
local       a file beside its label: found by name, hashed where it lies
urls        which URLs may be asked, and how they are sent
download    a URL into the cache: retries, resumption, limits
cache       the cache's size limit
parallel    threads, shared out by host
deinterlace interlaced frames through bwdif
structure   whether a file is as long as it says
tracks      which of a file's streams is the film
containers  a video file opened: frames in display order, with their times
colour      what a frame's colours mean
geometry    where stored pixels go on a bucket's canvas
images      still pictures
probe       what a file really is
decode      windows of a file as pixels
pictures    the JPEG and MP4 members made from a window
"""
