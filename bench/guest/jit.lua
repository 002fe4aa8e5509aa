-- Just-in-time code: loops over numbers, tables, strings and calls. Argument: rounds.
local bit = require("bit")

local function mandelbrot(size)
    local inside = 0
    for y = 0, size - 1 do
        for x = 0, size - 1 do
            local cr, ci, zr, zi, n = 2 * x / size - 1.5, 2 * y / size - 1, 0, 0, 0
            while n < 50 and zr * zr + zi * zi < 4 do
                zr, zi, n = zr * zr - zi * zi + cr, 2 * zr * zi + ci, n + 1
            end
            if n == 50 then inside = inside + 1 end
        end
    end
    return inside
end

local function sieve(n)
    local flags, found = {}, 0
    for i = 2, n do flags[i] = true end
    for i = 2, n do
        if flags[i] then
            found = found + 1
            for j = i * i, n, i do flags[j] = false end
        end
    end
    return found
end

local function hash(n)
    local h = 5381
    for i = 1, n do h = bit.bxor(bit.lshift(h, 5) + h, i) end
    return h
end

local function text(n)
    local parts = {}
    for i = 1, n do parts[#parts + 1] = string.char(97 + i % 26) end
    local found = 0
    for _ in table.concat(parts):gmatch("xyz") do found = found + 1 end
    return found
end

-- Many small functions made at run time, so that the compiler has something to do.
local function fresh(n)
    local sum = 0
    for k = 1, n do
        local f = loadstring("local s = 0 for i = 1, 200 do s = s + i % " .. k .. " end return s")
        sum = sum + f()
    end
    return sum
end

local result
for _ = 1, tonumber(arg[1]) do
    result = { mandelbrot(160), sieve(100000), hash(1000000), text(50000), fresh(300) }
end
print(table.concat(result, " "))
